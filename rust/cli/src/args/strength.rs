use std::str::FromStr;

use clap::Args;

/// Strengths by place.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Strengths by place")]
pub(crate) struct Places {
    /// Of the text encoders
    ///
    /// In place of the general strength.
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub(crate) text_encoder_strength: Option<f64>,
    /// Of a component (repeatable)
    ///
    /// In place of the general strength and that of the text encoders. Components have the names that diffusers gives them: transformer, text_encoder, text_encoder_2.
    #[arg(long, value_name = "NAME=S", hide_short_help = true)]
    pub(crate) component: Vec<Assignment>,
    /// Times S where it matches (repeatable)
    ///
    /// A selector is the beginning of a path in diffusers' names, such as `transformer_blocks.3.attn`, with block
    /// numbers `0-4,7`, `*` for any part of a segment, `**` for any segments, `{to_q,to_k}` for one of several, and
    /// `text_encoder:` in front for another component than the main one. Of several that match the last one counts.
    #[arg(long, value_name = "SELECTOR=S")]
    pub(crate) block: Vec<Assignment>,
    /// By blocks: a preset, or V1,V2,...
    ///
    /// Block weights as sd-webui-lora-block-weight, kohya and ComfyUI Inspire have them, times the strength: 57, 58 or 61 numbers
    /// for FLUX.1 and Chroma, 17 or 26 for Stable Diffusion, 12 or 20 for SDXL, or the name of a preset such as ALL0.5.
    /// Where a `--block` matches, that counts instead.
    #[arg(long, value_name = "WEIGHTS", allow_hyphen_values = true)]
    pub(crate) blocks: Option<String>,
}

impl Places {
    pub(crate) fn is_empty(&self) -> bool {
        self.text_encoder_strength.is_none()
            && self.component.is_empty()
            && self.block.is_empty()
            && self.blocks.is_none()
    }
}

/// `NAME=S`: a number for something that has a name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Assignment {
    pub(crate) name: String,
    pub(crate) number: f64,
}

impl FromStr for Assignment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, number) = text.rsplit_once('=').ok_or("it has no `=`; write NAME=NUMBER")?;
        let number = number.trim().parse().map_err(|_| format!("`{number}` is no number; write NAME=NUMBER"))?;
        match name.trim() {
            "" => Err("nothing stands before the `=`; write NAME=NUMBER".to_owned()),
            name => Ok(Self { name: name.to_owned(), number }),
        }
    }
}
