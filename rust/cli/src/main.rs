//! The `lorafmt` binary.

fn main() -> std::process::ExitCode {
    // On Windows the shell leaves globs to the program.
    std::process::ExitCode::from(lorafmt::run(wild::args_os()) as u8)
}
