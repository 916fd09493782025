//! A quantized checkpoint that is as small as can be: one block of each kind, true widths, mostly holes.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

use serde_json::json;

use crate::common::Place;

/// Layers with their inputs and outputs, and whether their input is the output of attention.
const LAYERS: [(&str, usize, usize, bool); 12] = [
    ("transformer_blocks.0.qkv_proj", 3072, 9216, false),
    ("transformer_blocks.0.qkv_proj_context", 3072, 9216, false),
    ("transformer_blocks.0.out_proj", 3072, 3072, true),
    ("transformer_blocks.0.out_proj_context", 3072, 3072, true),
    ("transformer_blocks.0.mlp_fc1", 3072, 12288, false),
    ("transformer_blocks.0.mlp_fc2", 12288, 3072, false),
    ("transformer_blocks.0.mlp_context_fc1", 3072, 12288, false),
    ("transformer_blocks.0.mlp_context_fc2", 12288, 3072, false),
    ("single_transformer_blocks.0.qkv_proj", 3072, 9216, false),
    ("single_transformer_blocks.0.mlp_fc1", 3072, 12288, false),
    ("single_transformer_blocks.0.out_proj", 3072, 3072, true),
    ("single_transformer_blocks.0.mlp_fc2", 12288, 3072, false),
];

/// A block of Z-Image, whose checkpoints have the names of the second generation.
const LATER: [(&str, usize, usize, bool); 4] = [
    ("layers.0.attention.to_qkv", 3840, 11520, false),
    ("layers.0.attention.to_out.0", 3840, 3840, true),
    ("layers.0.feed_forward.net.0.proj", 3840, 20480, false),
    ("layers.0.feed_forward.net.2", 10240, 3840, false),
];

/// bfloat16.
const ONE: u16 = 0x3f80;
const TWO: u16 = 0x4000;

/// What a checkpoint is like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Checkpoint {
    pub(crate) rank: usize,
    /// Whether the outputs of attention are smoothed already.
    pub(crate) smoothed: bool,
    /// The value of its branches, as bits of a bfloat16.
    pub(crate) branch: u16,
    /// Whether it is of the second generation.
    pub(crate) later: bool,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { rank: 32, smoothed: false, branch: ONE, later: false }
    }
}

impl Checkpoint {
    /// Writes it. Quantized weights and biases are zeros, and holes in the file.
    pub(crate) fn write(self, place: &Place, name: &str) {
        let mut header = serde_json::Map::new();
        let (mut at, mut filled) = (0, Vec::new());
        let mut tensor = |key: String, dtype: &str, shape: [usize; 2], value: u16| {
            let shape: Vec<usize> = shape.into_iter().filter(|n| *n > 0).collect();
            let count: usize = shape.iter().product();
            let end = at + count * if dtype == "BF16" { 2 } else { 1 };
            header.insert(key, json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]}));
            if value != 0 {
                filled.push((at, count, value));
            }
            at = end;
        };
        let layers: &[_] = if self.later { &LATER } else { &LAYERS };
        let [down, up, smooth, original] = match self.later {
            true => ["proj_down", "proj_up", "smooth_factor", "smooth_factor_orig"],
            false => ["lora_down", "lora_up", "smooth", "smooth_orig"],
        };
        for &(layer, inputs, outputs, attention) in layers {
            let key = |name: &str| format!("{layer}.{name}");
            let fused = self.smoothed && attention;
            tensor(key(down), "BF16", [inputs, self.rank], self.branch);
            tensor(key(up), "BF16", [outputs, self.rank], self.branch);
            tensor(key("bias"), "BF16", [outputs, 0], 0);
            tensor(key(smooth), "BF16", [inputs, 0], if fused { ONE } else { TWO });
            tensor(key(original), "BF16", [inputs, 0], TWO);
            tensor(key("wscales"), "BF16", [inputs / 64, outputs], 0);
            tensor(key("qweight"), "I8", [outputs, inputs / 2], 0);
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut file = File::create(place.path(name)).unwrap();
        file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
        file.write_all(&text).unwrap();
        let start = 8 + text.len();
        file.set_len((start + at) as u64).unwrap();
        for (at, count, value) in filled {
            file.seek(SeekFrom::Start((start + at) as u64)).unwrap();
            file.write_all(&value.to_le_bytes().repeat(count)).unwrap();
        }
    }
}
