use half::{bf16, f16};

use super::*;
use crate::compose::{Composition, Term, Unknown};
use crate::decode::decode;
use crate::detect::Given;
use crate::dtype::read_f64;
use crate::error::Code;
use crate::io::Source;
use crate::strength::Strength;
use crate::weights::{Checkpoint, FuseOptions, FuseReport, UnfuseOptions, fuse, unfuse};

fn run(base: &Path, adapters: &[(&Path, f64)], out: &Path, options: &FuseOptions) -> crate::Result<FuseReport> {
    let registry = toy();
    let opened: Vec<_> = adapters
        .iter()
        .map(|(path, _)| decode(&registry, &Arc::new(Source::open(path)?), &Given::default()))
        .collect::<crate::Result<_>>()?;
    let terms = opened.iter().zip(adapters).map(|(a, (_, s))| Term::new(a, Strength::uniform(*s))).collect();
    let checkpoint = Checkpoint::open(&registry, base, &[])?;
    fuse(&checkpoint, &Composition::new(terms)?, out, options, &Control::default())
}

fn read(path: &Path, key: &str) -> Vec<f64> {
    let source = Source::open(path).unwrap();
    let at = source.tensors().iter().position(|t| t.name == key).unwrap();
    let dtype = source.tensors()[at].dtype;
    source.bytes(at).chunks_exact(dtype.size()).map(|b| read_f64(dtype, b)).collect()
}

/// `w + s * up @ down`, in float64, by the definition.
fn added(w: &[f64], cols: usize, terms: &[(f64, &[f64], &[f64])]) -> Vec<f64> {
    let entry = |i: usize, j: usize| {
        let term = |(s, up, down): &(f64, &[f64], &[f64])| {
            let rank = down.len() / cols;
            s * (0..rank).map(|k| up[i * rank + k] * down[k * cols + j]).sum::<f64>()
        };
        w[i * cols + j] + terms.iter().map(term).sum::<f64>()
    };
    (0..w.len()).map(|at| entry(at / cols, at % cols)).collect()
}

/// A base in the fused namespace, and two adapters: one fused, one split.
struct Toy {
    folder: tempfile::TempDir,
    qkv: Vec<f64>,
    ada: Vec<f64>,
    up: Vec<f64>,
    down: Vec<f64>,
    up2: Vec<f64>,
    down2: Vec<f64>,
}

impl Toy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let toy = Self {
            folder,
            qkv: values(192, 1),
            ada: values(128, 2),
            up: values(48, 3),
            down: values(16, 4),
            up2: values(24, 5),
            down2: values(24, 6),
        };
        save(
            &toy.path("base"),
            &[
                ("layers.0.qkv.weight", tensor(Dtype::BF16, &[24, 8], &toy.qkv)),
                ("layers.0.qkv.bias", tensor(Dtype::BF16, &[24], &toy.qkv[..24])),
                ("final.ada.1.weight", tensor(Dtype::F16, &[16, 8], &toy.ada)),
                ("layers.1.query_norm.scale", tensor(Dtype::F32, &[8], &values(8, 8))),
                ("other.weight", tensor(Dtype::F32, &[3], &values(3, 9))),
            ],
        );
        save(
            &toy.path("fused"),
            &[
                ("toy_model.layers.0.qkv.lora_up.weight", tensor(Dtype::F32, &[24, 2], &toy.up)),
                ("toy_model.layers.0.qkv.lora_down.weight", tensor(Dtype::F32, &[2, 8], &toy.down)),
                ("toy_model.layers.0.qkv.alpha", tensor(Dtype::F32, &[], &[1.0])),
                ("toy_model.layers.0.qkv.diff_b", tensor(Dtype::F32, &[24], &toy.up[..24])),
            ],
        );
        save(
            &toy.path("split"),
            &[
                ("toy.blocks.0.attn.k.lora_B.weight", tensor(Dtype::BF16, &[8, 3], &toy.up2)),
                ("toy.blocks.0.attn.k.lora_A.weight", tensor(Dtype::BF16, &[3, 8], &toy.down2)),
                (
                    "toy.norm_out.linear.lora_B.weight",
                    tensor(Dtype::BF16, &[16, 3], &[&toy.up2[..], &toy.down2[..]].concat()),
                ),
                ("toy.norm_out.linear.lora_A.weight", tensor(Dtype::BF16, &[3, 8], &toy.down2)),
            ],
        );
        toy
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(format!("{name}.safetensors"))
    }
}

#[test]
fn every_adapter_goes_into_its_rows_and_is_rounded_once() {
    let toy = Toy::new();
    let out = toy.path("out");
    let adapters = [(&*toy.path("fused"), 0.7), (&*toy.path("split"), -1.3)];
    let report = run(&toy.path("base"), &adapters, &out, &FuseOptions::default()).unwrap();
    let zeros = vec![0.0; 24];
    let k_only = [zeros.clone(), toy.up2.clone(), zeros].concat();
    let want = added(&toy.qkv, 8, &[(0.7 * 0.5, &toy.up, &toy.down), (-1.3, &k_only, &toy.down2)]);
    let rounded: Vec<f64> = want.iter().map(|v| bf16::from_f64(*v).to_f64()).collect();
    assert_eq!(read(&out, "layers.0.qkv.weight"), rounded);
    // The base's rows are (shift, scale), the adapter's (scale, shift).
    let whole = [&toy.up2[..], &toy.down2[..]].concat();
    let exchanged = [&whole[24..], &whole[..24]].concat();
    let want = added(&toy.ada, 8, &[(-1.3, &exchanged, &toy.down2)]);
    let rounded: Vec<f64> = want.iter().map(|v| f16::from_f64(*v).to_f64()).collect();
    assert_eq!(read(&out, "final.ada.1.weight"), rounded);
    let bias: Vec<f64> = (0..24).map(|i| bf16::from_f64(toy.qkv[i] + 0.7 * toy.up[i]).to_f64()).collect();
    assert_eq!(read(&out, "layers.0.qkv.bias"), bias);
    for key in ["other.weight", "layers.1.query_norm.scale"] {
        assert_eq!(read(&out, key), read(&toy.path("base"), key));
    }
    let count = report.tensors;
    assert_eq!((count.input, count.used, count.dropped + count.unknown + count.carried), (8, 8, 0));
    assert_eq!(report.fused.len(), 3);
    assert!(report.fused.iter().all(|t| (t.gain.unwrap() - 1.0).abs() < 0.01 && t.err.unwrap() < 0.05), "{report:?}");
    let fused = Source::open(&out).unwrap();
    assert!(fused.metadata_value("lorafmt.fused").unwrap().contains("-1.3"));
}

#[test]
fn undone_to_the_byte() {
    let toy = Toy::new();
    let (out, undo, back) = (toy.path("out"), toy.path("undo"), toy.path("back"));
    let options = FuseOptions { undo: Some(undo.clone()), ..FuseOptions::default() };
    let adapters = [(&*toy.path("fused"), 0.7), (&*toy.path("split"), -1.3)];
    let report = run(&toy.path("base"), &adapters, &out, &options).unwrap();
    assert_eq!(report.undo.unwrap().bytes, std::fs::metadata(&undo).unwrap().len());
    let unfuse = |fused: &Path, back: &Path| {
        unfuse(&toy_registry(), fused, &undo, back, &UnfuseOptions::default(), &Control::default())
    };
    unfuse(&out, &back).unwrap();
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(toy.path("base")).unwrap());
    // Of another checkpoint: one bit, or the base itself.
    let mut bytes = std::fs::read(&out).unwrap();
    let at = Source::open(&out).unwrap().tensors().iter().find(|t| t.name == "final.ada.1.weight").unwrap().range.start;
    bytes[at] ^= 1;
    std::fs::write(toy.path("bent"), bytes).unwrap();
    for wrong in ["bent", "base", "fused"] {
        let error = unfuse(&toy.path(wrong), &toy.path("never")).unwrap_err();
        assert_eq!(error.code(), Code::WrongUndo, "{wrong}: {error}");
        assert!(!toy.path("never").exists());
    }
}

fn toy_registry() -> Arc<Registry> {
    toy()
}

#[test]
fn what_the_base_lacks_is_said() {
    let toy = Toy::new();
    let adapter = toy.path("more");
    save(
        &adapter,
        &[
            ("toy.blocks.0.attn.k.lora_B.weight", tensor(Dtype::BF16, &[8, 3], &toy.up2)),
            ("toy.blocks.0.attn.k.lora_A.weight", tensor(Dtype::BF16, &[3, 8], &toy.down2)),
            ("toy.blocks.1.attn.k.lora_B.weight", tensor(Dtype::BF16, &[8, 3], &toy.up2)),
            ("toy.blocks.1.attn.k.lora_A.weight", tensor(Dtype::BF16, &[3, 8], &toy.down2)),
        ],
    );
    let out = toy.path("out");
    let fails = |options: &FuseOptions, code: Code, said: &str| {
        let error = run(&toy.path("base"), &[(&adapter, 1.0)], &out, options).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(said), "{error}");
        assert!(!out.exists());
    };
    fails(&FuseOptions::default(), Code::MissingWeight, "blocks.1.attn.k");
    let keep = FuseOptions { unknown: Unknown::Keep, lossy: true, ..FuseOptions::default() };
    fails(&keep, Code::InvalidArgument, "carries no keys");
    let lossy = FuseOptions { lossy: true, ..FuseOptions::default() };
    let report = run(&toy.path("base"), &[(&adapter, 1.0)], &out, &lossy).unwrap();
    assert_eq!((report.tensors.used, report.tensors.dropped), (2, 2));
    assert!(report.warnings.iter().any(|w| w.code == "missing-weight"));
    // A base of that name and another shape.
    save(
        &toy.path("base"),
        &[
            ("layers.0.qkv.weight", tensor(Dtype::BF16, &[24, 4], &toy.qkv[..96])),
            ("layers.1.qkv.weight", tensor(Dtype::BF16, &[24, 8], &toy.qkv)),
        ],
    );
    std::fs::remove_file(&out).unwrap();
    fails(&FuseOptions::default(), Code::WrongBase, "layers.0.qkv.weight");
    assert_eq!(run(&toy.path("base"), &[(&adapter, 0.0)], &out, &lossy).unwrap_err().code(), Code::NoModules);
}
