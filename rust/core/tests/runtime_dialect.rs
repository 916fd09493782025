//! A new dialect costs no Rust: one given as text at run time, with names of its own, is written, read and recognised.

use std::path::Path;
use std::sync::Arc;

use lorafmt_core::compose::Composition;
use lorafmt_core::convert::{ConvertOptions, Target, convert, open};
use lorafmt_core::dtype::Dtype;
use lorafmt_core::io::{Bytes, Control, Source, TensorInfo};
use lorafmt_core::ops::diff;
use lorafmt_core::sample::{SampleOptions, sample};
use lorafmt_core::table::Registry;

const TABLE: &str = r#"
name = "acme"
title = "Acme trainer"
write = true
alpha = "tensor"

[spelling]
down = "/d"
up = "/u"
alpha = "/alpha"

[[place]]
families = ["flux1"]
component = "transformer"
namespace = "acme"
prefix = "acme|"

[[extend]]
families = ["flux1"]
component = "transformer"
namespace = "acme"
rows = [
  # q and k stay apart here, v is fused with the MLP; the final modulation is in the original order.
  { diffusers = "single_transformer_blocks.{single}.attn.{to_q,to_k}", acme = "s{single}.{q,k}", in = 3072, out = 3072 },
  { diffusers = "single_transformer_blocks.{single}.{attn.to_v,proj_mlp}", acme = "s{single}.vm", op = "fuse", in = 3072, out = [3072, 12288] },
  { diffusers = "norm_out.linear", acme = "last", op = "swap_halves", in = 3072, out = 6144 },
]
"#;

fn write(adapter: &lorafmt_core::adapter::Adapter, to: &str, lossy: bool) -> (Vec<u8>, lorafmt_core::report::Report) {
    let mut bytes = Vec::new();
    let options = ConvertOptions { to: to.to_owned(), lossy, ..ConvertOptions::default() };
    let report = convert(&Composition::of(adapter), &options, Target::Stream(&mut bytes), &Control::default())
        .expect("converts");
    (bytes, report)
}

fn read(registry: &Arc<Registry>, bytes: &[u8]) -> lorafmt_core::adapter::Adapter {
    let source = Source::from_bytes(Path::new("memory"), Box::new(bytes.to_vec())).expect("valid file");
    open(registry, source, &ConvertOptions::default(), None).expect("readable")
}

#[test]
fn a_dialect_given_as_text_round_trips_a_file() {
    let registry = Registry::with_tables(&[TABLE.to_owned()]).expect("valid table");
    let options = SampleOptions {
        family: "flux1".to_owned(),
        dialect: "kohya".to_owned(),
        rank: 2,
        alpha: Some(1.0),
        dtype: lorafmt_core::dtype::Dtype::BF16,
        seed: 7,
        top_level: true,
        text_encoders: false,
    };
    let kohya = open(&registry, sample(&registry, &options).expect("sample"), &ConvertOptions::default(), None)
        .expect("readable");
    // Only single blocks and the final modulation have names in it.
    let (bytes, report) = write(&kohya, "acme", true);
    assert!(report.tensors.dropped > 0 && report.tensors.used > 0 && report.tensors.unknown == 0);
    let count = report.tensors;
    assert_eq!(count.used + count.carried + count.dropped + count.unknown, count.input);

    let acme = read(&registry, &bytes);
    assert_eq!(acme.detection.dialect_name(&registry), "acme");
    assert_eq!(acme.family_table().name, "flux1");
    let name = |n: usize| format!("acme|s{n}.vm/u");
    assert!(acme.source.tensors().iter().any(|t| t.name == name(37) && t.shape == [15360, 2]));

    let (there, _) = write(&acme, "kohya", false);
    let back = read(&registry, &there);
    let report = diff(&acme, &back, 0.0).expect("one family");
    assert!(report.equal && report.modules == 38 * 4 + 1, "{report:?}");
    // Against the original, over what the dialect can hold.
    let whole = diff(&kohya, &back, 0.0).expect("one family");
    assert!(whole.differences.iter().all(|m| m.state == "only-a"), "{:?}", whole.differences.first());

    let (again, _) = write(&back, "acme", false);
    assert_eq!(again, bytes, "writing twice gives the same bytes");
}

/// Parts of 4, 6 and 2 rows, and a Kronecker product whose blocks have 4: the first part could be cut, the second not.
#[test]
fn a_module_of_which_only_some_parts_can_be_cut_is_refused_whole() {
    const FAMILY: &str = r#"
        name = "toy"
        title = "Toy"
        [[component]]
        name = "model"
        namespaces = ["split", "fused"]
        rows = [{ split = "{a,b,c}", fused = "abc", op = "fuse", in = 2, out = [4, 6, 2] }]
    "#;
    let dialect = |name: &str| {
        format!(
            "name = \"{name}\"\ntitle = \"{name}\"\nwrite = true\nalpha = \"tensor\"\n\
             [spelling]\nlokr_w1 = \".w1\"\nlokr_w2 = \".w2\"\n\
             [[place]]\nfamilies = [\"toy\"]\ncomponent = \"model\"\nnamespace = \"{name}\"\nprefix = \"{name}.\"\n"
        )
    };
    let registry =
        Registry::with_tables(&[FAMILY.to_owned(), dialect("split"), dialect("fused")]).expect("valid tables");
    let tensor = |name: &str, shape: Vec<usize>| {
        let bytes: Vec<u8> = (0..shape.iter().product::<usize>()).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let info = TensorInfo { name: name.to_owned(), dtype: Dtype::F32, shape, range: 0..0 };
        (info, Box::new(bytes) as Bytes)
    };
    let tensors = vec![tensor("fused.abc.w1", vec![3, 1]), tensor("fused.abc.w2", vec![4, 2])];
    let source = Source::from_tensors(Path::new("toy"), vec![], tensors).expect("sizes fit");
    let adapter = open(&registry, source, &ConvertOptions::default(), None).expect("readable");
    let to = |to: &str, lossy| {
        let options = ConvertOptions { to: to.to_owned(), lossy, ..ConvertOptions::default() };
        convert(&Composition::of(&adapter), &options, Target::Nowhere, &Control::default())
    };
    assert_eq!(to("fused", false).expect("the same name").tensors.used, 2);
    assert_eq!(to("split", false).expect_err("no such factors").code().as_str(), "unsupported-kind");
    assert_eq!(to("split", true).expect_err("nothing is left").code().as_str(), "no-modules");
}
