use serde_json::Value;

use crate::common::{MODULE, Place, adapter, borrowed, factors, file, known, tiny};

/// Two adapters, a copy, the same in another dialect, one times 0.8, and what is no adapter.
fn library() -> Place {
    let place = Place::new();
    place.write("loras/a.safetensors", &tiny());
    place.write("loras/copy/a.safetensors", &tiny());
    let scaled = factors(MODULE, &[("alpha", &[], 0.4)]);
    place.write("loras/b.safetensors", &file(&[], &borrowed(&scaled)));
    place.write("loras/c.safetensors", &adapter(2, 0.5));
    place.write("loras/d.safetensors", b"no adapter at all");
    place.ok(&["convert", "loras/a.safetensors", "--to", "diffusers", "-o", "loras/e.safetensors"]);
    place
}

fn named<'v>(document: &'v Value, name: &str) -> (usize, &'v Value) {
    let files = document["files"].as_array().unwrap();
    files.iter().enumerate().find(|(_, f)| f["path"].as_str().unwrap().ends_with(name)).unwrap()
}

#[test]
fn a_page_of_a_folder() {
    let place = library();
    let ran = place.run(&["report", "-r", "loras", "-o", "page.html"]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(
        ran.out.contains("wrote page.html") && ran.out.contains("6 files") && ran.out.contains("1 failed"),
        "{ran:?}"
    );
    assert!(ran.err.contains("d.safetensors") && ran.err.contains("hint: "), "{ran:?}");
    let page = String::from_utf8(place.read("page.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("Content-Security-Policy"));
    let (_, data) = page.split_once("<script id=\"data\" type=\"application/json\">").unwrap();
    let data: Value = serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap();
    assert_eq!((&data["schema"], &data["totals"]["files"]), (&1.into(), &6.into()));
    assert_eq!(place.names(), ["loras", "page.html"]);
}

#[test]
fn what_is_the_same_is_found() {
    let place = library();
    let ran = place.run(&["report", "-r", "loras", "--json"]);
    assert_eq!((ran.code, place.names().len()), (3, 1), "{ran:?}");
    let document = ran.json();
    let number = |name: &str| named(&document, name).0;
    let groups = document["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 2, "{groups:?}");
    let of = |relation: &str| groups.iter().find(|g| g["relation"] == relation).unwrap();
    assert_eq!(of("file")["files"], serde_json::json!([number("loras/a.safetensors"), number("copy/a.safetensors")]));
    assert_eq!(of("file")["spare_bytes"], tiny().len());
    assert_eq!(of("delta")["files"].as_array().unwrap().len(), 3);
    let near = &named(&document, "b.safetensors").1["near"];
    assert_eq!(near.as_array().unwrap().len(), 3, "{near}");
    assert_eq!(near[0]["cosine"], 1.0);
    // It is 0.8 of the others, so they are 1.25 times it.
    assert!((near[0]["ratio"].as_f64().unwrap() - 1.25).abs() < 1e-3, "{near}");
    assert!(named(&document, "c.safetensors").1["near"].as_array().unwrap().is_empty());
    let totals = &document["totals"];
    assert_eq!((&totals["duplicates"], &totals["similar"]), (&1.into(), &4.into()), "{totals}");
}

#[test]
fn a_file_that_fails_is_a_row() {
    let place = library();
    let document = place.run(&["report", "-r", "loras", "--json"]).json();
    let failed = named(&document, "d.safetensors").1;
    known(failed["error"]["code"].as_str().unwrap());
    assert!(failed["adapter"].is_null() && !failed["error"]["hint"].as_str().unwrap().is_empty());
    assert_eq!(document["totals"]["failed"], 1);
    // A page of files of which none can be read is written all the same.
    let alone = place.run(&["report", "loras/d.safetensors", "missing.safetensors", "-o", "page.html"]);
    assert_eq!((alone.code, place.exists("page.html")), (2, true), "{alone:?}");
}

#[test]
fn problems_come_with_a_command() {
    let place = Place::new();
    let mut tensors = factors(MODULE, &[("alpha", &[], 0.5)]);
    tensors.push(("lora_unet_nothing.alpha".to_owned(), vec![], 1.0));
    place.write("a b.safetensors", &file(&[], &borrowed(&tensors)));
    let document = place.ok(&["report", "a b.safetensors", "--json"]).json();
    let finding = &document["files"][0]["findings"][0];
    assert_eq!((&finding["level"], &finding["code"]), (&"problem".into(), &"unknown-key".into()));
    let command = finding["command"].as_str().unwrap();
    assert_eq!(command, "lorafmt convert 'a b.safetensors' --to kohya --unknown drop");
    place.ok(&["convert", "a b.safetensors", "--to", "kohya", "--unknown", "drop", "-o", "fixed.safetensors"]);
    let fixed = place.ok(&["report", "fixed.safetensors", "--json"]).json();
    assert!(fixed["files"][0]["findings"].as_array().unwrap().is_empty(), "{fixed}");
    assert_eq!(place.run(&["report", "a b.safetensors", "--strict", "--json"]).code, 1);
}

#[test]
fn headers_only() {
    let place = library();
    let document = place.run(&["report", "-r", "loras", "--no-weights", "--json"]).json();
    assert_eq!(document["weights"], false);
    assert!(document["groups"].as_array().unwrap().is_empty());
    let file = named(&document, "loras/a.safetensors").1;
    assert!(file["adapter"]["weights"].is_null() && file["near"].as_array().unwrap().is_empty());
}

#[test]
fn numbers_of_one_module_by_hand() {
    let place = Place::with_x();
    let document = place.ok(&["report", "x.safetensors", "--json"]).json();
    let weights = &document["files"][0]["adapter"]["weights"];
    // scale 0.5, up 0.5, down 0.25, 18432 x 3072 elements, rank 1.
    let want = 0.0625 * (18432f64 * 3072.0).sqrt();
    for norm in [&weights["norm"], &weights["values"][0], &weights["blocks"][0]["norm"]] {
        assert!((norm.as_f64().unwrap() / want - 1.0).abs() < 5e-4, "{norm} {want}");
    }
    assert_eq!(weights["kept"], serde_json::json!([1.0]));
}

#[test]
fn outputs_are_safe() {
    let place = Place::with_x();
    place.write("page.html", b"mine");
    let ran = place.run(&["report", "x.safetensors", "-o", "page.html", "--json"]);
    assert_eq!((ran.code, ran.error_code().as_str()), (2, "output-exists"));
    assert_eq!(place.read("page.html"), b"mine");
    place.ok(&["report", "x.safetensors", "-o", "page.html", "--force"]);
    assert!(place.read("page.html").starts_with(b"<!doctype html>"));
    let own = place.run(&["report", "x.safetensors", "-o", "x.safetensors", "--force", "--json"]);
    assert_eq!(own.error_code(), "same-file");
    assert_eq!(place.run(&["report", "x.safetensors"]).code, 2);
    assert_eq!(place.run(&["report", "x.safetensors", "--json", "-o", "-"]).error_code(), "invalid-argument");
    let plan = place.ok(&["report", "x.safetensors", "-n", "-o", "other.html"]);
    assert!(plan.out.contains("would write other.html") && !place.exists("other.html"), "{plan:?}");
    let streamed = place.ok(&["report", "x.safetensors", "-o", "-"]);
    assert!(streamed.out.starts_with("<!doctype html>") && streamed.err.contains("1 file"), "{}", streamed.err);
}

#[test]
fn one_run_is_like_another() {
    let place = library();
    let run = |jobs: &str| {
        let mut document = place.run(&["report", "-r", "loras", "--json", "--jobs", jobs]).json();
        for name in ["created", "seconds"] {
            document.as_object_mut().unwrap().remove(name);
        }
        document
    };
    assert_eq!(run("1"), run("2"));
}
