//! The help texts of all commands.

use clap::Command;

use crate::markdown::GENERATED;

/// Columns of the texts, whatever terminal the generator runs in.
const WIDTH: usize = 100;

pub(super) fn page() -> String {
    let mut program = lorafmt::command().term_width(WIDTH);
    program.build();
    let mut out = format!("{GENERATED}# Command line\n\n```text\n{}\n```\n", help(&mut program));
    for command in program.get_subcommands_mut().filter(|c| c.get_name() != "help") {
        out += &section(command.clone().term_width(WIDTH));
    }
    out
}

/// The help of one command, without the options that all commands share.
fn section(command: Command) -> String {
    let name = command.get_name().to_owned();
    let mut command = command.mut_args(|arg| {
        let shared = arg.is_global_set();
        arg.hide(shared)
    });
    format!("\n## {name}\n\n```text\n{}\n```\n", help(&mut command))
}

/// The text without the spaces that fill its lines.
fn help(command: &mut Command) -> String {
    let text = command.render_long_help().to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim_end().to_owned()
}
