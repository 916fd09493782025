use super::*;
use crate::error::Code;
use crate::weights::Checkpoint;

#[test]
fn parts_of_fused_tensors_and_exchanged_halves() {
    let (registry, folder) = (toy(), tempfile::tempdir().unwrap());
    let path = folder.path().join("base.safetensors");
    let (qkv, ada, scale) = (values(24 * 8, 1), values(16 * 8, 2), values(8, 3));
    save(
        &path,
        &[
            ("model.diffusion_model.layers.1.qkv.weight", tensor(Dtype::BF16, &[24, 8], &qkv)),
            ("model.diffusion_model.layers.1.qkv.bias", tensor(Dtype::BF16, &[24], &qkv[..24])),
            ("model.diffusion_model.final.ada.1.weight", tensor(Dtype::F16, &[16, 8], &ada)),
            ("model.diffusion_model.layers.0.query_norm.scale", tensor(Dtype::F32, &[8], &scale)),
            ("model.diffusion_model.final.linear.weight", tensor(Dtype::F32, &[5, 8], &values(40, 4))),
            ("vae.decoder.weight", tensor(Dtype::F32, &[1], &[1.0])),
        ],
    );
    let base = Checkpoint::open(&registry, &path, &[]).unwrap();
    assert_eq!(registry.families[base.family()].name, "toy");
    assert_eq!(base.weight(0, "blocks.1.attn.k").unwrap().to_f64(), qkv[64..128]);
    assert_eq!(base.bias(0, "blocks.1.attn.v").unwrap().to_f64(), qkv[16..24]);
    let swapped = base.weight(0, "norm_out.linear").unwrap();
    assert_eq!((swapped.dtype(), swapped.to_f64()), (Dtype::F16, [&ada[64..], &ada[..64]].concat()));
    assert_eq!(base.weight(0, "blocks.0.norm_q").unwrap().to_f64(), scale);
    assert!(base.weight(0, "blocks.0.attn.q").is_none() && base.bias(0, "norm_out.linear").is_none());
    // A shape that no module of that name has is no weight of it.
    assert!(base.weight(0, "proj_out").is_none());
}

#[test]
fn fp8_with_one_scale_or_one_for_each_row() {
    let (registry, folder) = (toy(), tempfile::tempdir().unwrap());
    let path = folder.path().join("base.safetensors");
    let (proj, qkv) = (fp8(Dtype::F8E4M3, &[8, 8], 1), fp8(Dtype::F8E5M2, &[24, 8], 2));
    let rows: Vec<f64> = (0..24).map(|i| 0.5 + f64::from(i)).collect();
    save(
        &path,
        &[
            ("layers.0.proj.weight", proj.clone()),
            ("layers.0.proj.weight_scale", tensor(Dtype::F32, &[], &[0.25])),
            ("layers.0.qkv.weight", qkv.clone()),
            ("layers.0.qkv.scale_weight", tensor(Dtype::F32, &[24, 1], &rows)),
            ("scaled_fp8", tensor(Dtype::F8E4M3, &[0], &[])),
        ],
    );
    let base = Checkpoint::open(&registry, &path, &[]).unwrap();
    let want: Vec<f64> = proj.to_f64().iter().map(|v| v * 0.25).collect();
    assert_eq!(base.weight(0, "blocks.0.attn.out.0").unwrap().to_f64(), want);
    let exact = qkv.to_f64();
    let want: Vec<f64> = (64..128).map(|i| exact[i] * rows[i / 8]).collect();
    assert_eq!(base.weight(0, "blocks.0.attn.k").unwrap().to_f64(), want);
}

/// A sharded folder in diffusers' form.
fn shards(folder: &Path) -> (Tensor, Tensor) {
    let (q, k) = (tensor(Dtype::BF16, &[8, 8], &values(64, 1)), tensor(Dtype::BF16, &[8, 8], &values(64, 2)));
    save(&folder.join("m-00001-of-00002.safetensors"), &[("blocks.0.attn.q.weight", q.clone())]);
    save(&folder.join("m-00002-of-00002.safetensors"), &[("blocks.0.attn.k.weight", k.clone())]);
    index(folder, &[("blocks.0.attn.q.weight", 1), ("blocks.0.attn.k.weight", 2)]);
    (q, k)
}

fn index(folder: &Path, map: &[(&str, usize)]) {
    let map: serde_json::Map<String, serde_json::Value> =
        map.iter().map(|(k, n)| ((*k).to_owned(), format!("m-0000{n}-of-00002.safetensors").into())).collect();
    let json = serde_json::json!({"metadata": {"total_size": 256}, "weight_map": map});
    std::fs::write(folder.join("m.safetensors.index.json"), json.to_string()).unwrap();
}

#[test]
fn shards_by_index_by_folder_and_in_a_pipeline() {
    let (registry, folder) = (toy(), tempfile::tempdir().unwrap());
    let inner = folder.path().join("transformer");
    let (q, k) = shards(&inner);
    std::fs::write(folder.path().join("model_index.json"), "{}").unwrap();
    for path in [inner.join("m.safetensors.index.json"), inner, folder.path().to_path_buf()] {
        let base = Checkpoint::open(&registry, &path, &[]).unwrap();
        assert_eq!(base.weight(0, "blocks.0.attn.q").unwrap().to_f64(), q.to_f64());
        assert_eq!(base.weight(0, "blocks.0.attn.k").unwrap().to_f64(), k.to_f64());
    }
}

#[test]
fn damaged_sets_of_shards() {
    let (registry, folder) = (toy(), tempfile::tempdir().unwrap());
    let place = folder.path();
    let fails = |code: Code, said: &str| {
        let error = Checkpoint::open(&registry, place, &[]).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(said), "{error}");
    };
    fails(Code::NotFound, "no weights");
    let (q, _) = shards(place);
    index(place, &[("blocks.0.attn.q.weight", 1), ("blocks.0.attn.k.weight", 2), ("blocks.0.attn.v.weight", 2)]);
    fails(Code::InvalidIndex, "blocks.0.attn.v.weight");
    index(place, &[("blocks.0.attn.q.weight", 1), ("blocks.0.attn.k.weight", 1)]);
    fails(Code::InvalidIndex, "blocks.0.attn.k.weight");
    index(place, &[("blocks.0.attn.q.weight", 1), ("blocks.0.attn.k.weight", 3)]);
    fails(Code::InvalidIndex, "m-00003-of-00002.safetensors");
    std::fs::write(place.join("m.safetensors.index.json"), r#"{"weight_map": {"a": "../x.safetensors"}}"#).unwrap();
    fails(Code::InvalidIndex, "`a`");
    index(place, &[("blocks.0.attn.q.weight", 1), ("blocks.0.attn.k.weight", 2)]);
    save(
        &place.join("m-00002-of-00002.safetensors"),
        &[("blocks.0.attn.k.weight", q.clone()), ("blocks.0.attn.q.weight", q)],
    );
    fails(Code::DuplicateKey, "two shards");
    let whole = std::fs::read(place.join("m-00002-of-00002.safetensors")).unwrap();
    std::fs::write(place.join("m-00002-of-00002.safetensors"), &whole[..whole.len() - 1]).unwrap();
    fails(Code::Truncated, "m-00002-of-00002");
    std::fs::remove_file(place.join("m.safetensors.index.json")).unwrap();
    fails(Code::InvalidIndex, "the index of the shards is missing");
}

#[test]
fn one_parameter_under_two_names_is_refused() {
    let (registry, folder) = (toy(), tempfile::tempdir().unwrap());
    let path = folder.path().join("base.safetensors");
    let t = |seed| tensor(Dtype::BF16, &[8, 8], &values(64, seed));
    save(&path, &[("layers.0.proj.weight", t(1)), ("blocks.0.attn.out.0.weight", t(2))]);
    assert_eq!(Checkpoint::open(&registry, &path, &[]).unwrap_err().code(), Code::DuplicateModule);
    save(&path, &[("something.else", t(1))]);
    assert_eq!(Checkpoint::open(&registry, &path, &[]).unwrap_err().code(), Code::UnknownFamily);
}
