// Words of names: runs of letters. The build script lists those of each table; so it, too, is made of this file.

/// The words of a text, in its order.
#[allow(unreachable_pub)] // The build script is another crate.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphabetic()).filter(|w| !w.is_empty())
}
