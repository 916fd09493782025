//! The `lorafmt` binary.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(lorafmt::run(std::env::args_os()) as u8)
}
