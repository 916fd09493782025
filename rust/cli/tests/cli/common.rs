//! Files to work on, and the command.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A module of FLUX.1 alone (Chroma has no modulation): 18432 outputs, 3072 inputs.
pub(crate) const MODULE: &str = "lora_unet_double_blocks_0_img_mod_lin";

/// An empty folder and the command in it.
pub(crate) struct Place {
    pub(crate) dir: TempDir,
}

/// What a run printed, and its status.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.err, "", "nothing is said beside the JSON");
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}", self.out))
    }

    /// The code of the JSON error.
    pub(crate) fn error_code(&self) -> String {
        let value = self.json();
        assert_eq!(value["schema"], 1);
        let error = &value["error"];
        for field in ["code", "message", "path", "key", "hint"] {
            assert!(error.get(field).is_some(), "{field} in {error}");
        }
        known(error["code"].as_str().unwrap())
    }
}

/// A code that the engine documents.
pub(crate) fn known(code: &str) -> String {
    assert!(lorafmt_core::Code::ALL.iter().any(|c| c.as_str() == code), "{code}");
    code.to_owned()
}

/// The command with a clean environment.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorafmt"));
    for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "FORCE_COLOR", "LORAFMT_NUM_THREADS", "LORAFMT_NO_PROGRESS"]
    {
        command.env_remove(name);
    }
    command
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }

    /// With `x.safetensors` in it.
    pub(crate) fn with_x() -> Self {
        let place = Self::new();
        place.write("x.safetensors", &tiny());
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// Names in the folder, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        names(self.dir.path())
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = command();
        command.current_dir(self.dir.path()).args(args);
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        ran(&mut self.command(args))
    }

    /// A run that must be done well.
    pub(crate) fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}: {ran:?}");
        ran
    }
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

pub(crate) fn ran(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A tensor to be: key, shape, the one value of all elements (float32).
pub(crate) type Spec<'a> = (&'a str, &'a [usize], f32);

/// A safetensors file.
pub(crate) fn file(metadata: &[(&str, &str)], tensors: &[Spec<'_>]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
        header.insert("__metadata__".into(), Value::Object(entries));
    }
    let mut body = Vec::new();
    for (key, shape, value) in tensors {
        let start = body.len();
        let count: usize = shape.iter().product();
        body.extend(std::iter::repeat_n(value.to_le_bytes(), count).flatten());
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, body.len()]});
        header.insert((*key).to_owned(), entry);
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes.extend(body);
    bytes
}

/// A kohya file of one module of rank 1, with a scale of 0.5.
pub(crate) fn tiny() -> Vec<u8> {
    module(MODULE, &[("alpha", &[], 0.5)])
}

/// Both factors of one module, and more of its tensors.
pub(crate) fn module(base: &str, more: &[Spec<'_>]) -> Vec<u8> {
    file(&[], &borrowed(&factors(base, more)))
}

pub(crate) fn factors<'a>(base: &str, more: &[Spec<'a>]) -> Vec<(String, Vec<usize>, f32)> {
    let factors: [Spec<'a>; 2] = [("lora_down.weight", &[1, 3072], 0.25), ("lora_up.weight", &[18432, 1], 0.5)];
    let all = factors.iter().chain(more);
    all.map(|(suffix, shape, value)| (format!("{base}.{suffix}"), shape.to_vec(), *value)).collect()
}

pub(crate) fn borrowed(tensors: &[(String, Vec<usize>, f32)]) -> Vec<Spec<'_>> {
    tensors.iter().map(|(key, shape, value)| (key.as_str(), shape.as_slice(), *value)).collect()
}

/// `used + carried + dropped + unknown == in`.
pub(crate) fn adds_up(report: &Value) {
    let tensors = &report["tensors"];
    let n = |name: &str| tensors[name].as_u64().unwrap();
    assert_eq!(n("used") + n("carried") + n("dropped") + n("unknown"), n("in"), "{tensors}");
}

/// The codes of a report's warnings.
pub(crate) fn codes(report: &Value) -> Vec<&str> {
    report["warnings"].as_array().unwrap().iter().map(|w| w["code"].as_str().unwrap()).collect()
}

/// A kohya file of one module of each kind that matters to quantized models, and one of a text encoder.
pub(crate) fn adapter(rank: usize, value: f32) -> Vec<u8> {
    let modules = [
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216),
        ("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072),
        ("lora_unet_double_blocks_0_img_mlp_0", 3072, 12288),
        ("lora_unet_single_blocks_0_linear1", 3072, 21504),
        ("lora_unet_single_blocks_0_linear2", 15360, 3072),
        ("lora_unet_single_blocks_0_modulation_lin", 3072, 9216),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 768, 3072),
    ];
    let mut tensors: Vec<(String, Vec<usize>, f32)> = Vec::new();
    for (base, inputs, outputs) in modules {
        tensors.push((format!("{base}.lora_down.weight"), vec![rank, inputs], value));
        tensors.push((format!("{base}.lora_up.weight"), vec![outputs, rank], 0.125));
        tensors.push((format!("{base}.alpha"), vec![], 1.0));
    }
    file(&[], &borrowed(&tensors))
}
