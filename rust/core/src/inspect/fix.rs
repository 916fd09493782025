//! Commands that make another file of one.

use super::{Inspection, Loader};

impl Inspection {
    /// The command that makes a file which the program loads; `None` if it loads this one, or none can be made.
    pub fn fix(&self, loader: &Loader) -> Option<String> {
        let dialect = loader.convert_to.as_ref()?;
        let command = if loader.expand { "expand" } else { "convert" };
        let options = [
            (loader.needs_base, " --base BASE"),
            (loader.needs_weights, " --base-weights MODEL --rank RANK"),
            (!self.unknown.is_empty(), " --unknown drop"),
        ];
        let options: String = options.into_iter().filter_map(|(wanted, option)| wanted.then_some(option)).collect();
        Some(format!("lorafmt {command} {} --to {dialect}{options}", quoted(&self.path)))
    }
}

/// A path as a word of a shell command.
pub fn quoted(path: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:@%+=,\\".contains(c);
    // What begins with a hyphen would be taken for an option, quoted or not.
    let path = if path.starts_with('-') && path != "-" { format!("./{path}") } else { path.to_owned() };
    if !path.is_empty() && path.chars().all(plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_shell() {
        assert_eq!(quoted("a b's"), r"'a b'\''s'");
        assert_eq!(quoted("a/b-1.safetensors"), "a/b-1.safetensors");
        assert_eq!(quoted("$(x)"), "'$(x)'");
        assert_eq!((quoted(""), quoted("-"), quoted("-rf x")), ("''".into(), "-".into(), "'./-rf x'".into()));
    }
}
