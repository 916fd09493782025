//! stub until merged
#![allow(missing_docs)]
#[derive(Debug, Clone, PartialEq)]
pub struct Selector(String);
impl Selector {
    pub fn matches(&self, _c: &str, _m: bool, _p: &str) -> bool {
        false
    }
}
impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
#[derive(Debug, Clone, PartialEq)]
pub struct Strength {
    pub all: f64,
    pub text_encoders: Option<f64>,
    pub components: std::collections::BTreeMap<String, f64>,
    pub blocks: Vec<(Selector, f64)>,
}
impl Strength {
    pub fn uniform(all: f64) -> Self {
        Self { all, text_encoders: None, components: Default::default(), blocks: vec![] }
    }
    pub fn of(&self, _c: &str, _m: bool, _p: &str) -> f64 {
        self.all
    }
    pub fn everywhere(&self) -> Option<f64> {
        Some(self.all)
    }
    pub fn check(&self) -> crate::Result<()> {
        Ok(())
    }
    pub fn to_json(&self) -> serde_json::Value {
        self.all.into()
    }
    pub fn times(&self, f: f64) -> Self {
        Self { all: self.all * f, ..self.clone() }
    }
}
