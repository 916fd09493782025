use serde_json::json;

use crate::common::{MODULE, Place, Spec, adds_up, borrowed, codes, factors, file, module};

/// A LoKr of one layer of FLUX.1, both factors of which have rank 1, and one of a fused layer that cannot be cut.
fn lokr() -> Vec<u8> {
    let base = "lora_unet_double_blocks_0_img_attn";
    let names = ["proj.lokr_w1", "proj.lokr_w2", "qkv.lokr_w1", "qkv.lokr_w2"].map(|n| {
        let (layer, slot) = n.split_once('.').unwrap();
        format!("{base}_{layer}.{slot}")
    });
    let tensors: [Spec<'_>; 4] = [
        (&names[0], &[16, 16], 0.5),
        (&names[1], &[192, 192], 0.25),
        (&names[2], &[16, 16], 0.5),
        (&names[3], &[576, 192], 0.25),
    ];
    file(&[], &tensors)
}

#[test]
fn the_lowest_exact_rank_is_found() {
    let place = Place::new();
    place.write("a.safetensors", &lokr());
    let ran = place.ok(&["expand", "a.safetensors"]);
    assert!(ran.out.starts_with("wrote a.lora.safetensors  (kohya -> kohya, flux1, "), "{}", ran.out);
    assert!(ran.out.contains("2 modules made plain (2 lokr), rank 1, relative error 0\n"), "{}", ran.out);
    place.ok(&["diff", "a.safetensors", "a.lora.safetensors"]);
    // Its parts can be named now, which those of a LoKr cannot.
    let refused = place.run(&["convert", "a.safetensors", "--to", "diffusers"]);
    assert!(refused.code == 2 && refused.err.contains("`lorafmt expand` makes plain LoRA of it"), "{}", refused.err);
    let report = place.ok(&["expand", "a.safetensors", "--to", "diffusers", "-o", "d.safetensors", "--json"]).json();
    adds_up(&report);
    assert_eq!((&report["source"]["kind"], &report["modules"]), (&json!("lokr"), &json!(4)));
    assert_eq!(report["expand"]["modules"][0]["rank_before"], 1);
    place.ok(&["convert", "a.safetensors", "--to", "diffusers", "--max-rank", "192", "-o", "c.safetensors"]);
    place.ok(&["diff", "c.safetensors", "d.safetensors"]);
}

#[test]
fn what_needs_weights_says_so() {
    let place = Place::new();
    place.write("a.safetensors", &module(MODULE, &[("dora_scale", &[18432, 1], 1.0)]));
    let run = place.run(&["expand", "a.safetensors", "--rank", "4", "--json"]);
    assert_eq!((run.code, run.error_code().as_str()), (2, "weights-needed"));
    assert!(run.json()["error"]["hint"].as_str().unwrap().contains("--base-weights"));
    assert!(run.json()["error"]["key"].as_str().unwrap().starts_with(MODULE));
    assert!(!place.exists("a.lora.safetensors"));
    // With nothing else in the file nothing would be written.
    let left = place.run(&["expand", "a.safetensors", "--rank", "4", "--lossy", "allow", "--json"]);
    assert_eq!(left.error_code(), "no-modules");
    let both =
        [factors(MODULE, &[("dora_scale", &[18432, 1], 1.0)]), factors("lora_unet_double_blocks_1_img_mod_lin", &[])];
    place.write("b.safetensors", &file(&[], &borrowed(&both.concat())));
    let report = place.ok(&["expand", "b.safetensors", "--lossy", "allow", "--json"]).json();
    adds_up(&report);
    assert_eq!((&report["tensors"]["dropped"], &report["expand"]["left_out"]), (&json!(3), &json!(1)));
    assert_eq!(codes(&report), ["weights-needed"]);
}

#[test]
fn ranks_that_make_no_sense() {
    let place = Place::new();
    place.write("a.safetensors", &lokr());
    for args in [["--rank", "0"], ["--energy", "2"], ["--max-error", "-1"]] {
        let run = place.run(&[&["expand", "a.safetensors", "--json"], &args[..]].concat());
        assert_eq!(run.error_code(), "invalid-argument", "{args:?}");
    }
    assert_eq!(place.names(), ["a.safetensors"]);
    // More ranks than there are change nothing.
    place.ok(&["expand", "a.safetensors", "--rank", "9999", "-o", "b.safetensors"]);
    place.ok(&["diff", "a.safetensors", "b.safetensors"]);
}
