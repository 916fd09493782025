//! What shells and `man` want to know of the command line.

use lorafmt_core::{Code, Error, Result};
use serde_json::json;

use super::Context;
use crate::ExitStatus;
use crate::args::{self, CompletionsArgs, ManArgs};

pub(super) fn completions(args: &CompletionsArgs, context: &mut Context) -> Result<ExitStatus> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::command(), "lorafmt", &mut script);
    Ok(print(context, &script, &json!({"schema": 1, "shell": args.shell.to_string()})))
}

pub(super) fn man(args: &ManArgs, context: &mut Context) -> Result<ExitStatus> {
    let mut command = args::command();
    command.build();
    let chosen = match &args.command {
        None => command,
        Some(name) => {
            let found = command.find_subcommand(name).cloned();
            let page =
                found.ok_or_else(|| Error::new(Code::InvalidArgument, format!("no command is called `{name}`")))?;
            let title = format!("lorafmt-{}", page.get_name());
            page.name(title)
        }
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(chosen).render(&mut page).expect("memory takes everything");
    Ok(print(context, &page, &json!({"schema": 1, "command": args.command})))
}

fn print(context: &mut Context, text: &[u8], about: &serde_json::Value) -> ExitStatus {
    let text = String::from_utf8_lossy(text);
    if context.out.json {
        let mut document = about.clone();
        document["text"] = text.into();
        context.out.document(&document);
    } else {
        context.out.answer(&text);
    }
    ExitStatus::Success
}
