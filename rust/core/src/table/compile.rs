//! What is worked out of the tables of one family when it is first needed: its modules, where every dialect puts them,
//! and how they are found.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, OnceLock};

use super::pattern::Template;
use super::source::{Sources, invalid};
use super::{Component, Native, Op, Place, family, lookup, native, place, raw};
use crate::error::Result;

/// A family in one size, worked out.
#[derive(Debug, Clone)]
pub(super) struct Compiled {
    pub components: Vec<Component>,
    /// By dialect.
    pub places: Vec<Vec<Place>>,
    /// By dialect.
    pub natives: Vec<Vec<Native>>,
    pub names: lookup::Names,
}

/// Worked out once, by whoever needs it first.
#[derive(Clone)]
pub(super) struct Lazy(Arc<LazyLock<Compiled, Box<dyn FnOnce() -> Compiled + Send + Sync>>>);

impl Lazy {
    /// The family of that number, when it is needed. Only for tables that are known to be valid.
    pub(super) fn later(sources: &Arc<Sources>, number: usize) -> Self {
        let sources = Arc::clone(sources);
        let make = move || compile(&sources, number).expect("the built-in tables are valid: a test compiles them");
        Self(Arc::new(LazyLock::new(Box::new(make))))
    }

    pub(super) fn now(sources: &Sources, number: usize) -> Result<Self> {
        let compiled = compile(sources, number)?;
        Ok(Self(Arc::new(LazyLock::new(Box::new(move || compiled)))))
    }
}

impl Deref for Lazy {
    type Target = Compiled;

    fn deref(&self) -> &Compiled {
        &self.0
    }
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lazy")
    }
}

/// The components of a family.
#[derive(Debug, Clone)]
pub struct Components(pub(super) Lazy);

impl Deref for Components {
    type Target = [Component];

    fn deref(&self) -> &[Component] {
        &self.0.components
    }
}

impl<'a> IntoIterator for &'a Components {
    type Item = &'a Component;
    type IntoIter = std::slice::Iter<'a, Component>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Where a dialect puts components, by family.
#[derive(Debug, Clone)]
pub struct Places {
    pub(super) dialect: usize,
    pub(super) families: Arc<[Lazy]>,
}

impl Places {
    /// Those of a family, by component.
    pub fn of(&self, family: usize) -> &[Place] {
        &self.families[family].places[self.dialect]
    }

    /// Those of all families, which works all of them out: for listings only.
    pub fn all(&self) -> impl Iterator<Item = &Place> {
        (0..self.families.len()).flat_map(|family| self.of(family))
    }
}

/// The quantized models that a dialect writes branches for; working them out takes their families alone.
#[derive(Debug, Clone)]
pub struct Natives {
    pub(super) dialect: usize,
    /// Numbers of the families.
    pub(super) of: Vec<usize>,
    pub(super) families: Arc<[Lazy]>,
    pub(super) all: OnceLock<Vec<Native>>,
}

impl Natives {
    /// That of a family.
    pub fn of(&self, family: usize) -> Option<&Native> {
        self.of.contains(&family).then(|| self.families[family].natives[self.dialect].first()).flatten()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }
}

impl Deref for Natives {
    type Target = [Native];

    fn deref(&self) -> &[Native] {
        let own = |&f: &usize| self.families[f].natives[self.dialect].iter().cloned();
        self.all.get_or_init(|| self.of.iter().flat_map(own).collect())
    }
}

impl<'a> IntoIterator for &'a Natives {
    type Item = &'a Native;
    type IntoIter = std::slice::Iter<'a, Native>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

fn compile(sources: &Sources, number: usize) -> Result<Compiled> {
    let size = &sources.sizes[number];
    let table = sources.family(size.family)?;
    let mut components = family::compile(sources, table, size.variant.as_deref())?;
    for dialect in &sources.dialects {
        extend(dialect, &table.name, &mut components)?;
    }
    let mut places = Vec::new();
    let mut natives = Vec::new();
    for dialect in &sources.dialects {
        places.push(place::compile(dialect, number, table, &components)?);
        let mut own = Vec::new();
        for table in dialect.native.iter().filter(|n| n.families.contains(&table.name)) {
            let at = find(&dialect.name, &components, &table.component)?;
            let compiled = native::compile(table, number, at, &components[at]);
            own.push(compiled.map_err(|e| invalid(&dialect.name, e))?);
        }
        natives.push(own);
    }
    let names = lookup::Names::of(&table.name, &components, &places)?;
    Ok(Compiled { components, places, natives, names })
}

fn find(file: &str, components: &[Component], name: &str) -> Result<usize> {
    let found = components.iter().position(|c| c.name == name);
    found.ok_or_else(|| invalid(file, format!("a family has no component `{name}`")))
}

/// Adds the namespaces that a dialect brings with it.
fn extend(raw: &raw::Dialect, name: &String, components: &mut [Component]) -> Result<()> {
    for extension in raw.extend.iter().filter(|e| e.families.contains(name)) {
        let at = find(&raw.name, components, &extension.component)?;
        let component = &mut components[at];
        if component.namespaces.contains(&extension.namespace) {
            return Err(invalid(&raw.name, format!("`{name}` has a namespace `{}` already", extension.namespace)));
        }
        component.namespaces.push(extension.namespace.clone());
        for row in &mut component.rows {
            row.names.push(None);
            row.params.push(None);
        }
        let own = component.rows.len();
        for row in &extension.rows {
            family::extend(&raw.name, component, row)?;
        }
        absorb(component, own);
        if extension.rest {
            name_rest(component);
        }
    }
    Ok(())
}

/// Rows from the number `own` on that only name a module again give their name to the row that it has.
fn absorb(component: &mut Component, own: usize) {
    for new in component.rows.split_off(own) {
        let known = component.rows.iter_mut().filter(|_| new.op == Op::Rename);
        match known.into_iter().find(|row| row.op == Op::Rename && row.canonical == new.canonical) {
            Some(row) => {
                let last = row.names.len() - 1;
                row.names[last].clone_from(&new.names[last]);
            }
            None => component.rows.push(new),
        }
    }
}

/// Gives modules that the last namespace does not name their canonical names there. A row that exchanges halves does so
/// under every other name, and stays without one.
fn name_rest(component: &mut Component) {
    let named = component.rows.iter().filter(|r| r.names.last().is_some_and(Option::is_some));
    let named: Vec<Template> = named.flat_map(|r| r.canonical.clone()).collect();
    for row in &mut component.rows {
        if let ([own], Some(name)) = (row.canonical.as_slice(), row.names.last_mut())
            && row.op != Op::SwapHalves
            && !named.contains(own)
        {
            *name = Some(own.clone());
            let last = row.params.len() - 1;
            row.params[last] = row.params[0].clone();
        }
    }
}
