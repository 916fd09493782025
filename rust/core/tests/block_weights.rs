//! Block weights and nested scales: every number reaches its modules and no others.

#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lorafmt_core::Code;
use lorafmt_core::strength::{Request, Strength, Weights};
use lorafmt_core::table::{Family, Registry};
use serde_json::json;

/// A U-Net as diffusers names it: blocks that hold attention, of `blocks` down and as many up.
fn unet(name: &str, blocks: usize, down: &[usize], up: &[usize]) -> Arc<Registry> {
    let mut rows = vec!["conv_in".to_owned(), "conv_out".to_owned(), "time_embedding.linear_{1,2}".to_owned()];
    let mut block = |at: String, layers: usize, attention: bool| {
        for j in 0..layers {
            rows.push(format!("{at}.resnets.{j}.conv1"));
            if attention {
                rows.push(format!("{at}.attentions.{j}.transformer_blocks.0.attn1.{{to_q,to_k}}"));
            }
        }
    };
    for i in 0..blocks {
        block(format!("down_blocks.{i}"), 2, down.contains(&i));
        block(format!("up_blocks.{i}"), 3, up.contains(&i));
    }
    for j in 0..2 {
        rows.push(format!("mid_block.resnets.{j}.conv1"));
    }
    rows.push("mid_block.attentions.0.proj_in".to_owned());
    for i in 0..blocks - 1 {
        rows.push(format!("down_blocks.{i}.downsamplers.0.conv"));
        rows.push(format!("up_blocks.{i}.upsamplers.0.conv"));
    }
    let rows: Vec<String> = rows.iter().map(|row| format!("{{ hf = \"{row}\", in = 8, out = 8 }}")).collect();
    let table = format!(
        "name = \"{name}\"\ntitle = \"{name}\"\n[[component]]\nname = \"unet\"\nnamespaces = [\"hf\"]\nrows = [{}]\n\
         [[component]]\nname = \"text_encoder\"\nuse = \"clip-l\"\n",
        rows.join(", ")
    );
    Registry::with_tables(&[table]).expect("a valid table")
}

fn sd() -> Arc<Registry> {
    unet("sd", 4, &[0, 1, 2], &[1, 2, 3])
}

fn sdxl() -> Arc<Registry> {
    unet("xl", 3, &[1, 2], &[0, 1])
}

fn family<'a>(registry: &'a Registry, name: &str) -> &'a Family {
    &registry.families[registry.family(name).expect("known")]
}

/// The factor of every module, by component and path.
fn factors(family: &Family, strength: &Strength) -> BTreeMap<String, f64> {
    let mut out = BTreeMap::new();
    for (number, component) in family.components.iter().enumerate() {
        for path in component.paths() {
            out.insert(format!("{}:{path}", component.name), strength.of(&component.name, number == 0, &path));
        }
    }
    out
}

fn resolved(family: &Family, json: serde_json::Value) -> Strength {
    Request::from_json(&json).expect("a request").resolve(family).expect("for the family")
}

fn vector(family: &Family, numbers: &[f64]) -> Strength {
    resolved(family, json!({ "block_weights": numbers }))
}

/// The modules that the numbered slot alone changes.
fn reached(family: &Family, length: usize, slot: usize) -> BTreeSet<String> {
    let mut numbers = vec![1.0; length];
    numbers[slot] = 3.0;
    let all = factors(family, &vector(family, &numbers));
    all.into_iter().filter(|(_, factor)| *factor == 3.0).map(|(path, _)| path).collect()
}

/// The block and its number in a path of the main component, found without selectors.
fn numbered(path: &str, block: &str) -> Option<usize> {
    path.strip_prefix("transformer:")?.strip_prefix(block)?.strip_prefix('.')?.split('.').next()?.parse().ok()
}

#[test]
fn each_slot_of_the_long_vectors_is_its_block() {
    let registry = Registry::builtin();
    for (name, clip, t5) in [("flux1", "text_encoder:", "text_encoder_2:"), ("chroma", "nothing:", "text_encoder:")] {
        let family = family(&registry, name);
        let all: Vec<String> = factors(family, &Strength::default()).into_keys().collect();
        let wanted = |test: &dyn Fn(&str) -> bool| all.iter().filter(|p| test(p)).cloned().collect::<BTreeSet<_>>();
        let double = |n: usize| wanted(&|p| numbered(p, "transformer_blocks") == Some(n));
        let single = |n: usize| wanted(&|p| numbered(p, "single_transformer_blocks") == Some(n));
        for (length, before) in [(57, 0), (58, 1), (61, 3)] {
            for n in 0..19 {
                assert!(double(n).len() > 8);
                assert_eq!(reached(family, length, before + n), double(n), "{name} {length} D{n}");
            }
            for n in 0..38 {
                assert!(single(n).len() > 4);
                assert_eq!(reached(family, length, before + 19 + n), single(n), "{name} {length} S{n}");
            }
        }
        let outside = wanted(&|p| !p.contains("transformer_blocks."));
        assert_eq!(reached(family, 58, 0), outside, "{name} BASE");
        assert_eq!(reached(family, 61, 0), wanted(&|p| p.starts_with(clip)));
        assert_eq!(reached(family, 61, 1), wanted(&|p| p.starts_with(t5)));
        let ends = |p: &&String| p.starts_with("transformer:proj_out") || p.starts_with("transformer:norm_out");
        let (last, first): (BTreeSet<String>, BTreeSet<String>) =
            outside.iter().filter(|p| p.starts_with("transformer:")).cloned().partition(|p| ends(&p));
        assert!(!first.is_empty() && !last.is_empty());
        assert_eq!(reached(family, 61, 2), first, "{name} IN");
        assert_eq!(reached(family, 61, 60), last, "{name} OUT");
    }
}

/// The number of a U-Net's module in the original's input or output blocks, as kohya's `get_lbw_block_index` counts.
fn original(path: &str) -> Option<String> {
    let path = path.strip_prefix("unet:")?;
    let parts: Vec<&str> = path.split('.').collect();
    let number = |at: usize| parts.get(at).and_then(|n| n.parse::<usize>().ok());
    Some(match (parts[0], parts.get(2).copied()) {
        ("conv_in", _) => "IN00".to_owned(),
        ("mid_block", _) => "M00".to_owned(),
        ("down_blocks", Some("downsamplers")) => format!("IN{:02}", 3 * (number(1)? + 1)),
        ("down_blocks", _) => format!("IN{:02}", 3 * number(1)? + number(3)? + 1),
        ("up_blocks", Some("upsamplers")) => format!("OUT{:02}", 3 * number(1)? + 2),
        ("up_blocks", _) => format!("OUT{:02}", 3 * number(1)? + number(3)?),
        _ => return None,
    })
}

fn names(text: &str) -> Vec<String> {
    let mut out = vec!["BASE".to_owned()];
    for part in text.split(' ') {
        let (name, numbers) = part.split_once(':').unwrap_or((part, ""));
        out.extend(numbers.split(',').map(|n| if n.is_empty() { name.to_owned() } else { format!("{name}{n}") }));
    }
    out
}

#[test]
fn each_slot_of_the_short_vectors_is_its_block() {
    let (sd, sdxl) = (sd(), sdxl());
    let to = |last: usize| (0..=last).map(|n| format!("{n:02}")).collect::<Vec<_>>().join(",");
    let cases = [
        (family(&sd, "sd"), "IN:01,02,04,05,07,08 M00 OUT:03,04,05,06,07,08,09,10,11".to_owned(), 17),
        (family(&sd, "sd"), format!("IN:{} M00 OUT:{}", to(11), to(11)), 26),
        (family(&sdxl, "xl"), "IN:04,05,07,08 M00 OUT:00,01,02,03,04,05".to_owned(), 12),
        (family(&sdxl, "xl"), format!("IN:{} M00 OUT:{}", to(8), to(8)), 20),
    ];
    for (family, slots, length) in cases {
        let slots = names(&slots);
        assert_eq!(slots.len(), length);
        let all: Vec<String> = factors(family, &Strength::default()).into_keys().collect();
        let slot_of = |path: &String| original(path).filter(|s| slots.contains(s)).unwrap_or_else(|| "BASE".into());
        for (at, slot) in slots.iter().enumerate() {
            let wanted: BTreeSet<String> = all.iter().filter(|path| slot_of(path) == *slot).cloned().collect();
            assert!(!wanted.is_empty(), "{slot}");
            assert_eq!(reached(family, length, at), wanted, "{} {length} {slot}", family.name);
        }
    }
}

#[test]
fn different_numbers_stay_apart_and_equal_ones_come_together() {
    let registry = Registry::builtin();
    let family = family(&registry, "flux1");
    let numbers: Vec<f64> = (0..61).map(|n| f64::from(n) / 8.0 - 2.0).collect();
    let all = factors(family, &vector(family, &numbers));
    for n in 0..19 {
        assert_eq!(all[&format!("transformer:transformer_blocks.{n}.attn.to_q")], numbers[3 + n]);
    }
    for n in 0..38 {
        assert_eq!(all[&format!("transformer:single_transformer_blocks.{n}.proj_out")], numbers[22 + n]);
    }
    let mut numbers = vec![1.0; 58];
    numbers[..6].fill(0.5);
    numbers[8] = 0.25;
    assert_eq!(
        vector(family, &numbers).to_json(),
        json!({"strength": 1.0, "blocks": {"*:": 0.5, "transformer_blocks.5-6,8-18": 1.0, "transformer_blocks.7": 0.25,
               "single_transformer_blocks.0-37": 1.0}})
    );
    // What was written is read as the same factors.
    let strength = vector(family, &numbers);
    let again = Strength::from_json(&strength.to_json()).expect("what was written");
    assert_eq!(factors(family, &again), factors(family, &strength));
    assert_eq!(vector(family, &[1.0; 57]), Strength::default());
}

#[test]
fn presets() {
    let (builtin, sd, sdxl) = (Registry::builtin(), sd(), sdxl());
    let (flux, sd, sdxl) = (family(&builtin, "flux1"), family(&sd, "sd"), family(&sdxl, "xl"));
    let preset = |family: &Family, name: &str| resolved(family, json!({"block_weights": name}));
    for family in [flux, sd, sdxl] {
        for (name, number) in [("NONE", 0.0), ("ALL", 1.0), ("ALL0.5", 0.5), ("all0.5", 0.5)] {
            assert!(factors(family, &preset(family, name)).values().all(|f| *f == number), "{name}");
        }
    }
    assert!(factors(flux, &preset(flux, "FLUXALL")).values().all(|f| *f == 1.0));
    let middle = [1., 0., 0., 0., 1., 1., 1., 1., 1., 1., 1., 1., 0., 0., 0., 0., 0.];
    assert_eq!(factors(sd, &preset(sd, "MIDD")), factors(sd, &vector(sd, &middle)));
    let ins = [1., 1., 1., 1., 1., 0., 0., 0., 0., 0., 0., 0.];
    assert_eq!(factors(sdxl, &preset(sdxl, "INALL")), factors(sdxl, &vector(sdxl, &ins)));
    let outs = preset(sd, "OUTS");
    assert_eq!(outs.of("unet", true, "up_blocks.2.attentions.1.proj"), 1.0);
    assert_eq!(outs.of("unet", true, "up_blocks.2.attentions.0.proj"), 0.0);
    assert_eq!(outs.of("text_encoder", false, "text_model.encoder"), 1.0);
}

#[test]
fn vectors_and_presets_that_a_family_has_not() {
    let (builtin, sd) = (Registry::builtin(), sd());
    let cases: [(&Family, serde_json::Value, &str, &str); 7] = [
        (family(&builtin, "flux1"), json!([1, 2, 3]), "3 block weights", "57 (D00-D18, S00-S37); 58 (BASE, D00-D18"),
        (family(&builtin, "chroma"), json!("0.5"), "1 block weights", "61 (CLIP, T5, IN, D00-D18, S00-S37, OUT)"),
        (family(&builtin, "flux1"), json!("MIDD"), "`MIDD` is not for FLUX.1", "ALL0.5, FLUXALL, NONE; vectors of 57"),
        (family(&builtin, "flux1"), json!("nothing"), "called `nothing`", "vectors of 57, 58, 61 numbers"),
        (family(&sd, "sd"), json!(vec![0.5; 12]), "12 block weights", "17 (BASE, IN01-IN02"),
        (family(&sd, "sd"), json!("FLUXALL"), "is not for sd", "MIDD0.2"),
        (family(&builtin, "wan"), json!(vec![0.5; 17]), "17 block weights", "no vectors are defined"),
    ];
    for (family, weights, message, hint) in cases {
        let request = Request::from_json(&json!({"block_weights": weights})).expect("a request");
        let error = request.resolve(family).expect_err(message);
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(message), "{error}");
        assert!(error.hint_text().contains(hint), "{}", error.hint_text());
    }
}

#[test]
fn how_weights_are_written() {
    let vector = |numbers: &[f64]| Weights::Vector(numbers.to_vec());
    for text in ["1,-0.5,2e-1", " [1, -0.5, 0.2] ", "1 , -.5 , +0.2"] {
        assert_eq!(Weights::parse(text).expect(text), vector(&[1.0, -0.5, 0.2]), "{text}");
    }
    assert_eq!(Weights::parse(" MIDD0.2 ").expect("a name"), Weights::Preset("MIDD0.2".into()));
    assert_eq!(Weights::parse("0.5").expect("a number"), vector(&[0.5]));
    for (text, said) in [("", "empty"), ("1,R,1", "block weight 2 is `R`"), ("1,2,", "block weight 3 is ``")] {
        assert!(Weights::parse(text).expect_err(text).message().contains(said), "{text}");
    }
    let json = |value: serde_json::Value| Request::from_json(&json!({"block_weights": value}));
    assert!(json(json!([1, "x"])).expect_err("text").message().contains("block weight 2 is \"x\""));
    assert!(json(json!({"a": 1})).is_err() && json(json!(3)).is_err());
    let infinite = Request { weights: Some(vector(&[1.0, f64::NAN])), ..1.0.into() };
    assert!(infinite.check().expect_err("NaN").message().contains("block weight 2 is NaN"));
}

#[test]
fn selectors_count_before_weights() {
    let registry = Registry::builtin();
    let family = family(&registry, "flux1");
    let strength = resolved(
        family,
        json!({"strength": 2.0, "text_encoder_strength": 0.5, "block_weights": "ALL0.5",
               "scales": {"transformer": {"transformer_blocks": {"1": 0.25, "2": 1}}},
               "blocks": {"transformer_blocks.2.attn.{to_q,to_k}": 3.0}}),
    );
    let main = |path: &str| strength.of("transformer", true, path);
    assert_eq!(main("transformer_blocks.0.attn.to_q"), 1.0);
    assert_eq!(main("transformer_blocks.1.attn.to_q"), 0.5);
    assert_eq!(main("transformer_blocks.2.attn.to_v"), 2.0);
    assert_eq!(main("transformer_blocks.2.attn.to_q"), 6.0);
    assert_eq!(strength.of("text_encoder", false, "text_model.encoder.layers.0.mlp.fc1"), 0.25);
}

#[test]
fn nested_scales_follow_the_names_of_the_family() {
    let registry = Registry::builtin();
    let family = family(&registry, "flux1");
    let single: Vec<f64> = (0..38).map(f64::from).collect();
    let strength = resolved(
        family,
        json!({"scales": {"text_encoder": {"text_model.encoder.layers": {"3": 0.5}}, "transformer": {
            "transformer_blocks": {"1": 0.5, "10": {"attn": 0.25, "ff": {"net": {"0": 2, "2": 3}}}},
            "single_transformer_blocks": single, "x_embedder": -1}}}),
    );
    let double = |path: &str| match numbered(path, "transformer_blocks") {
        Some(1) => 0.5,
        Some(10) if path.contains("0.attn.") => 0.25,
        Some(10) if path.contains(".ff.net.0") => 2.0,
        Some(10) if path.contains(".ff.net.2") => 3.0,
        _ => 1.0,
    };
    let all = factors(family, &strength);
    for (path, factor) in &all {
        let wanted = match numbered(path, "single_transformer_blocks") {
            Some(n) => single[n],
            None if path == "transformer:x_embedder" => -1.0,
            None if path.starts_with("text_encoder:text_model.encoder.layers.3.") => 0.5,
            None => double(path),
        };
        assert_eq!(*factor, wanted, "{path}");
    }
}

#[test]
fn nested_scales_in_the_words_of_a_unet() {
    // What `set_adapters` of diffusers 0.42.1 makes of it: number j of a block is for all that is j-th in it.
    let registry = sdxl();
    let family = family(&registry, "xl");
    let strength =
        resolved(family, json!({"scales": {"unet": {"down": {"block_1": [0.5, 0.25]}, "mid": [2], "up": 4}}}));
    for (path, factor) in factors(family, &strength) {
        let parts: Vec<&str> = path.split('.').collect();
        let wanted = match (parts[0], parts.get(1).copied(), parts.get(3).copied()) {
            ("unet:down_blocks", Some("1"), Some("0")) => 0.5,
            ("unet:down_blocks", Some("1"), Some("1")) => 0.25,
            ("unet:up_blocks", Some("0" | "1"), _) => 4.0,
            ("unet:mid_block", Some("attentions"), _) => 2.0,
            _ => 1.0,
        };
        assert_eq!(factor, wanted, "{path}");
    }
    let exact = resolved(family, json!({"scales": {"unet": {"down_blocks": {"2": {"resnets": [0.5, 1]}}}}}));
    let hit = |path: &str| exact.of("unet", true, path);
    assert_eq!((hit("down_blocks.2.resnets.0.conv1"), hit("down_blocks.2.attentions.0.proj")), (0.5, 1.0));
}

#[test]
fn nested_scales_that_make_no_sense() {
    let (builtin, sdxl) = (Registry::builtin(), sdxl());
    let (flux, sdxl) = (family(&builtin, "flux1"), family(&sdxl, "xl"));
    let cases = [
        (flux, json!({"unet": 1}), "no component `unet`", "components: transformer, text_encoder, text_encoder_2"),
        (flux, json!({"transformer": {"transformer_block": 1}}), "no `transformer_block`", "transformer_blocks"),
        (
            flux,
            json!({"transformer": {"transformer_blocks": {"19": 1}}}),
            "`transformer.transformer_blocks` has no `19`",
            "0, 1",
        ),
        (flux, json!({"transformer": {"transformer_blocks": [1, 2]}}), "takes 19 scales", "one number"),
        (flux, json!({"transformer": [1]}), "no blocks numbered", "x_embedder"),
        (
            flux,
            json!({"transformer": {"transformer_blocks": {"0": {"ff": {"net": [1, 2]}}}}}),
            "no blocks numbered",
            "0, 2",
        ),
        (flux, json!({"transformer": {"down": 1}}), "has no `down`", "it has"),
        (sdxl, json!({"unet": {"down": {"block_0": 1}}}), "no `block_0` with attention", "block_1, block_2"),
        (sdxl, json!({"unet": {"down": {"block_1": [1, 2, 3]}}}), "`down.block_1` takes 2 scales", "one number"),
        (sdxl, json!({"unet": {"mid": [1, 2]}}), "`mid` takes 1 scales", "one number"),
        (sdxl, json!({"unet": {"mid": {"a": 1}}}), "`mid` is neither", "write 1 numbers"),
        (sdxl, json!({"unet": {"sideways": 1}}), "`unet` has no `sideways`", "down, mid, up, conv_in"),
    ];
    for (family, scales, message, hint) in cases {
        let request = Request::from_json(&json!({ "scales": scales })).expect("a request");
        let error = request.resolve(family).expect_err(message);
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(message), "{error}");
        assert!(error.hint_text().contains(hint), "{message}: {}", error.hint_text());
    }
    for json in [json!({"scales": 1}), json!({"scales": {"transformer": {"a": "x"}}}), json!({"scale": {}})] {
        assert_eq!(Request::from_json(&json).expect_err("no request").code(), Code::InvalidArgument);
    }
}

/// The built-in U-Nets are the models that the vectors are for.
#[test]
fn vectors_of_real_families() {
    let builtin = Registry::builtin();
    for (name, lengths) in [("sd15", [17, 26]), ("sd21", [17, 26]), ("sdxl", [12, 20])] {
        for length in lengths {
            let request = Request::from_json(&json!({"block_weights": vec![0.5; length]})).expect("a request");
            assert!(request.resolve(family(&builtin, name)).is_ok(), "{name} {length}");
        }
    }
}
