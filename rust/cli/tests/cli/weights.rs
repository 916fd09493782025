use crate::common::{MODULE, Place, borrowed, codes, factors, file};

const OTHER: &str = "lora_unet_double_blocks_3_img_mod_lin";

fn two(second: f32) -> Vec<u8> {
    let mut tensors = factors(MODULE, &[("alpha", &[], 0.5)]);
    tensors.extend(factors(OTHER, &[]).into_iter().map(|(key, shape, value)| {
        let value = if key.contains("up") { second } else { value };
        (key, shape, value)
    }));
    file(&[], &borrowed(&tensors))
}

#[test]
fn weights_of_rank_one_by_hand() {
    let place = Place::new();
    place.write("x.safetensors", &two(0.0));
    let weights = &place.ok(&["inspect", "x.safetensors", "--weights", "--json"]).json()["weights"];
    // scale 0.5, up 0.5, down 0.25, 18432 x 3072 elements.
    let want = 0.0625 * (18432f64 * 3072.0).sqrt();
    let norm = weights["total"]["norm"].as_f64().unwrap();
    assert!((norm / want - 1.0).abs() < 1e-9, "{norm} {want}");
    let module = &weights["modules"][0];
    assert_eq!((&module["status"], &module["spectrum"]["rank"]), (&"ok".into(), &1.into()));
    assert_eq!(weights["dead"], serde_json::json!(["transformer.transformer_blocks.3.norm1.linear"]));
    assert_eq!(weights["blocks"][1]["block"], "transformer_blocks.3");
    assert!(place.ok(&["inspect", "x.safetensors", "--json"]).json().get("weights").is_none());
}

#[test]
fn weights_as_a_table() {
    let place = Place::new();
    place.write("x.safetensors", &two(0.125));
    insta::assert_snapshot!(place.ok(&["inspect", "x.safetensors", "--weights"]).out);
}

#[test]
fn nan_is_a_warning_and_no_failure() {
    let place = Place::new();
    place.write("x.safetensors", &two(f32::NAN));
    let info = place.ok(&["inspect", "x.safetensors", "--weights", "--json"]).json();
    assert_eq!(codes(&info), ["not-finite"]);
    assert_eq!(info["weights"]["modules"][1]["status"], "not-finite");
    assert_eq!(place.run(&["inspect", "x.safetensors", "--weights", "--strict"]).code, 1);
}

#[test]
fn differences_in_numbers() {
    let place = Place::new();
    place.write("a.safetensors", &two(0.5));
    place.write("b.safetensors", &two(-0.5));
    let ran = place.run(&["diff", "a.safetensors", "b.safetensors", "--by", "module", "--json"]);
    let report = ran.json();
    assert_eq!((ran.code, report["by_module"].as_array().unwrap().len()), (1, 2));
    let (same, opposite) = (&report["by_module"][0], &report["by_module"][1]);
    assert_eq!((&same["cosine"], &opposite["cosine"]), (&1.0.into(), &(-1.0).into()));
    // Squared norms 1 and 4, inner products 1 and -4.
    let cosine = report["cosine"].as_f64().unwrap();
    assert!((cosine + 0.6).abs() < 1e-9, "{cosine}");
    assert_eq!(report["by_block"].as_array().unwrap().len(), 2);
    let text = place.run(&["diff", "a.safetensors", "b.safetensors", "--by", "block"]).out;
    assert!(text.contains("all together"), "{text}");
}
