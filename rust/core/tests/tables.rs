//! Properties of the tables, over every row of every family and dialect.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use lorafmt_core::kind::Slot;
use lorafmt_core::table::{Component, Op, Place, Registry, Row};

/// Names of all layers of a component in one namespace.
fn layers(component: &Component, namespace: usize) -> BTreeSet<String> {
    let rows = component.rows.iter().filter(|r| r.op != Op::Only);
    let names = rows.flat_map(|row| {
        component.instances(row).into_iter().flat_map(move |v| {
            let templates: Vec<_> =
                if namespace == 0 { row.canonical.iter().collect() } else { row.names[namespace].iter().collect() };
            templates.into_iter().map(move |t| t.render(&v)).collect::<Vec<_>>()
        })
    });
    names.collect()
}

/// Built-in tables are worked out when they are needed; here all are, with what no table shows by itself.
#[test]
fn the_built_in_tables_are_valid() {
    Registry::builtin().check().expect("valid");
    assert!(Registry::builtin().programs().len() > 10);
}

#[test]
fn flux_has_all_its_layers() {
    // 504 Linear modules in FluxTransformer2DModel, 314 in the original code.
    let registry = Registry::builtin();
    let family = &registry.families[registry.family("flux1").expect("built in")];
    let transformer = &family.components[family.component("transformer").expect("has one")];
    assert_eq!(layers(transformer, 0).len(), 504);
    assert_eq!(layers(transformer, transformer.namespace("original").expect("has one")).len(), 314);
    assert_eq!(layers(transformer, transformer.namespace("xlabs").expect("has one")).len(), 19 * 4 + 38 * 2);
    let clip = &family.components[family.component("text_encoder").expect("has one")];
    assert_eq!(layers(clip, 0).iter().filter(|n| n.starts_with("text_model")).count(), 12 * 6);
    let t5 = &family.components[family.component("text_encoder_2").expect("has one")];
    assert_eq!(layers(t5, 0).len(), 24 * 7);
}

/// What quantized models leave in 16 bits, beside what is outside all blocks.
fn left_alone(family: &str, path: &str) -> bool {
    let parts: &[&str] = match family {
        "qwen-image" => &[],
        "z-image" => &["adaLN_modulation", "all_", "cap_embedder", "t_embedder"],
        "sdxl" => &["attn2.to_k", "attn2.to_v", ".resnets.", ".proj_", "samplers.", "_embedding."],
        _ => &[],
    };
    parts.iter().any(|part| path.contains(part))
}

/// Every linear module of the quantized blocks has its place in the layers, all its inputs once, and every layer is
/// found by its name.
#[test]
fn native_layers_cover_the_blocks() {
    let registry = Registry::builtin();
    for native in registry.dialects.iter().flat_map(|d| &d.natives) {
        let family = &registry.families[native.family];
        let component = &family.components[native.component];
        let closed = native.closed.iter().flat_map(|t| component.instances_of(t).into_iter().map(|v| t.render(&v)));
        let closed: BTreeSet<String> = closed.collect();
        let mut columns: BTreeMap<String, Vec<Range<usize>>> = BTreeMap::new();
        let mut names = BTreeSet::new();
        for (number, layer) in native.layers.iter().enumerate() {
            for v in component.instances_of(&layer.name) {
                let name = layer.name.render(&v);
                assert_eq!(native.find(component, &name).map(|(l, _)| l), Some(number), "{name}");
                let vector = layer.vector.as_ref().map(|t| native.find_vector(component, &t.render(&v)));
                assert!(vector.is_none_or(|found| found.map(|(l, _)| l) == Some(number)), "{name}");
                assert!(names.insert(name), "a layer twice");
                assert_eq!((layer.input % 16, layer.output() % 128), (0, 0));
                for module in &layer.modules {
                    let all = 0..layer.width;
                    columns.entry(module.render(&v)).or_default().push(layer.columns.clone().unwrap_or(all));
                }
            }
        }
        let in_blocks = |path: &String| path.chars().any(|c| c.is_ascii_digit()) && !path.starts_with("time");
        let modules = layers(component, 0).into_iter().filter(in_blocks);
        let (plain, modules): (BTreeSet<_>, BTreeSet<_>) = modules.partition(|p| left_alone(&family.name, p));
        assert_eq!(modules, columns.keys().chain(&closed).cloned().collect(), "{}", family.name);
        assert!(!plain.iter().any(|p| columns.contains_key(p) || closed.contains(p)), "{}", family.name);
        for (module, layer) in &native.feeds {
            let fed = &native.layers[*layer];
            assert_eq!(module.bounds(), fed.name.bounds(), "{}", family.name);
            for v in component.instances_of(module) {
                assert!(plain.contains(&module.render(&v)), "{}", family.name);
                let (row, ..) = component.canonical(&module.render(&v)).expect("a row has it");
                assert_eq!(component.rows[row].output(), fed.input);
            }
        }
        for (module, mut parts) in columns {
            let (row, ..) = component.canonical(&module).expect("a row has it");
            parts.sort_by_key(|p| p.start);
            assert!(parts.windows(2).all(|w| w[0].end == w[1].start), "{module}");
            assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, component.rows[row].inputs[0]), "{module}");
        }
    }
    let natives: Vec<_> = registry.dialects.iter().flat_map(|d| &d.natives).collect();
    let names: Vec<&str> = natives.iter().map(|n| registry.families[n.family].name.as_str()).collect();
    let known: BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(known, BTreeSet::from(["flux1", "qwen-image", "sdxl", "z-image"]));
    assert_eq!(natives[0].layers.iter().filter(|l| l.interleave.is_none()).count(), 8 + 4);
    let instances = |n: &lorafmt_core::table::Native| -> usize {
        let component = &registry.families[n.family].components[n.component];
        n.layers.iter().map(|l| component.instances_of(&l.name).len()).sum()
    };
    // SVDQW4A4Linear modules of the classes: 60 blocks of 8, 34 of 4, and in SDXL's UNet 70 of 6.
    let counts: BTreeMap<&str, usize> = names.iter().copied().zip(natives.iter().map(|n| instances(n))).collect();
    assert_eq!((counts["qwen-image"], counts["z-image"], counts["sdxl"]), (480, 136, 420));
}

/// What a dialect writes for a layer must be read back as that layer, with every slot, whichever prefix is used.
#[test]
fn every_written_key_is_read_back() {
    let registry = Registry::builtin();
    let mut keys = 0;
    for dialect in &registry.dialects {
        for place in dialect.places.all() {
            let component = &registry.families[place.family].components[place.component];
            for (index, row) in component.rows.iter().enumerate() {
                // The first and the last block of each kind: what lies between them differs in a number.
                let instances = component.instances(row);
                let ends: BTreeSet<&Vec<u32>> = instances.first().into_iter().chain(instances.last()).collect();
                for variables in ends {
                    for name in names(row, place, variables) {
                        for prefix in place.also.iter().chain([&place.prefix]) {
                            keys += check(&registry, dialect, place, component, index, prefix, &name);
                        }
                    }
                }
            }
        }
    }
    assert!(keys > 20_000, "only {keys} keys");
}

fn names(row: &Row, place: &Place, variables: &[u32]) -> Vec<String> {
    match place.namespace {
        0 => row.canonical.iter().map(|t| t.render(variables)).collect(),
        n => row.names[n].iter().map(|t| t.render(variables)).collect(),
    }
}

fn check(
    registry: &Registry,
    dialect: &lorafmt_core::table::Dialect,
    place: &Place,
    component: &Component,
    row: usize,
    prefix: &str,
    name: &str,
) -> usize {
    let flat = prefix.ends_with('_');
    let path = if flat { name.replace('.', "_") } else { name.to_owned() };
    let only = component.rows[row].op == Op::Only;
    let fits = |slot: &&Slot| if only { slot.fits_only() } else { **slot != Slot::Set };
    let mut count = 0;
    for &slot in dialect.spelling.keys().filter(fits) {
        let suffix = dialect.suffix(slot, component.rows[row].params[place.namespace].as_deref()).expect("spelled");
        let key = format!("{prefix}{path}{suffix}");
        let read = registry.read(&key).unwrap_or_else(|| panic!("`{key}` is not read"));
        let hit = read.hits.iter().find(|h| (h.family, h.component) == (place.family, place.component));
        let hit = hit.unwrap_or_else(|| panic!("`{key}` is read as another component"));
        let found = &component.rows[hit.row];
        let wanted = &component.rows[row];
        let same = found.canonical.iter().any(|t| wanted.canonical.contains(t));
        assert!(same, "`{key}` is read as another row");
        let slot_read = if slot == Slot::MagnitudeIn { Slot::Magnitude } else { slot };
        assert_eq!(read.suffix.slot, slot_read, "`{key}`");
        count += 1;
    }
    count
}

#[test]
fn names_within_a_namespace_are_unique() {
    let registry = Registry::builtin();
    for family in &registry.families {
        for component in &family.components {
            for namespace in 0..component.namespaces.len() {
                let rows: Vec<String> = component
                    .rows
                    .iter()
                    .filter(|r| namespace > 0 || r.names.len() == 1 || r.names[1..].iter().any(Option::is_some))
                    .flat_map(|row| {
                        component.instances(row).into_iter().flat_map(move |v| {
                            row.names[namespace].iter().map(move |t| t.render(&v)).collect::<Vec<_>>()
                        })
                    })
                    .collect();
                let unique: BTreeSet<&String> = rows.iter().collect();
                assert_eq!(unique.len(), rows.len(), "{} {}", family.name, component.namespaces[namespace]);
            }
        }
    }
}

#[test]
fn broken_tables_are_refused() {
    let dialect = |body: &str| format!("name = \"x\"\ntitle = \"X\"\nalpha = \"folded\"\n{body}");
    let place =
        "[[place]]\nfamilies = [\"flux1\"]\ncomponent = \"transformer\"\nnamespace = \"original\"\nprefix = \"p.\"\n";
    let good = dialect(&format!("[spelling]\ndown = \".d\"\nup = \".u\"\n{place}"));
    assert!(Registry::with_tables(std::slice::from_ref(&good)).is_ok());
    let cases = [
        "not toml at all [".to_owned(),
        dialect(&format!("colour = \"red\"\n[spelling]\n{place}")),
        dialect(&format!("[spelling]\nside = \".d\"\n{place}")),
        good.replace("flux1", "flux9"),
        good.replace("transformer", "unet"),
        good.replace("\"original\"", "\"ldm\""),
        good.replace("name = \"x\"", "name = \"civitai\""),
        format!(
            "{good}\n[[extend]]\nfamilies = [\"flux1\"]\ncomponent = \"transformer\"\nnamespace = \"mine\"\nrows = [{{ diffusers = \"a.{{treble}}\", mine = \"b\", in = 1, out = 1 }}]\n"
        ),
        format!(
            "{good}\n[[extend]]\nfamilies = [\"flux1\"]\ncomponent = \"transformer\"\nnamespace = \"mine\"\nrows = [{{ diffusers = \"x.{{a,b}}\", mine = \"y\", op = \"fuse\", in = 1, out = 1 }}]\n"
        ),
    ];
    for table in cases {
        let error =
            Registry::with_tables(std::slice::from_ref(&table)).err().unwrap_or_else(|| panic!("accepted: {table}"));
        assert_eq!(error.code().as_str(), "invalid-table", "{table}");
    }
}

#[test]
fn the_nearest_key_is_one_that_is_read() {
    let registry = Registry::builtin();
    let nearest = |key: &str| registry.nearest(key);
    assert_eq!(
        nearest("lora_unet_double_blocks_3_img_attn_qkw.alpha").as_deref(),
        Some("lora_unet_double_blocks_3_img_attn_qkv.alpha")
    );
    for key in ["transformer.single_transformer_blocks.40.attn.to_q.lora_A.weight", "mystery", ""] {
        assert!(nearest(key).is_none_or(|found| found != key && registry.read(&found).is_some()), "{key}");
    }
    // Comparing takes the square of the length: a megabyte of name gets no suggestion, at once.
    assert_eq!(nearest(&format!("lora_unet_{}.alpha", "x".repeat(1 << 20))), None);
}

#[test]
fn a_sample_has_a_limit() {
    let options = lorafmt_core::sample::SampleOptions {
        family: "flux1".to_owned(),
        dialect: "kohya".to_owned(),
        rank: usize::MAX,
        alpha: None,
        dtype: lorafmt_core::dtype::Dtype::BF16,
        seed: 0,
        top_level: false,
        text_encoders: false,
    };
    let error = lorafmt_core::sample::sample(&Registry::builtin(), &options).expect_err("too large");
    assert_eq!(error.code().as_str(), "invalid-argument");
}

#[test]
fn a_sample_of_any_model_has_layers() {
    let registry = Registry::builtin();
    for (f, family) in registry.families.iter().enumerate() {
        for dialect in registry.dialects.iter().filter(|d| d.writes(f) && d.native(f).is_none()).take(2) {
            let options = lorafmt_core::sample::SampleOptions {
                family: family.label(),
                dialect: dialect.name.clone(),
                rank: 1,
                alpha: None,
                dtype: lorafmt_core::dtype::Dtype::BF16,
                seed: 0,
                top_level: false,
                text_encoders: false,
            };
            let source = lorafmt_core::sample::sample(&registry, &options);
            let what = format!("{} {}", options.family, options.dialect);
            assert!(source.is_ok_and(|s| s.tensors().len() > 10), "{what}");
        }
    }
}
