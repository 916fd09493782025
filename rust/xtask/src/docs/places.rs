//! Where dialects put components, with families that are alike taken together.

use lorafmt_core::table::{Dialect, Place, Registry};

/// Places of a dialect that have the same prefixes and names, whatever the family.
pub(super) struct Group<'r> {
    pub dialect: &'r Dialect,
    pub namespace: &'r str,
    /// One for each family, in its first size, and component.
    pub places: Vec<&'r Place>,
}

impl Group<'_> {
    /// The prefixes and the note of all.
    pub(super) fn first(&self) -> &Place {
        self.places[0]
    }

    /// The names of the components, each once.
    pub(super) fn components<'r>(&self, registry: &'r Registry) -> Vec<&'r str> {
        let mut out = Vec::new();
        for place in &self.places {
            let name = registry.families[place.family].components[place.component].name.as_str();
            if !out.contains(&name) {
                out.push(name);
            }
        }
        out
    }

    /// The names of the families, each once.
    pub(super) fn families<'r>(&self, registry: &'r Registry) -> Vec<&'r str> {
        let mut out: Vec<&str> = self.places.iter().map(|p| registry.families[p.family].name.as_str()).collect();
        out.dedup();
        out
    }
}

/// Numbers of all families in their first size.
pub(super) fn families(registry: &Registry) -> Vec<usize> {
    let all = &registry.families;
    (0..all.len()).filter(|&f| f == 0 || all[f - 1].name != all[f].name).collect()
}

pub(super) fn groups<'r>(registry: &'r Registry, dialect: &'r Dialect) -> Vec<Group<'r>> {
    let first = families(registry);
    let mut out: Vec<Group<'r>> = Vec::new();
    for place in dialect.places.all().filter(|p| first.contains(&p.family)) {
        let namespace =
            registry.families[place.family].components[place.component].namespaces[place.namespace].as_str();
        let same = |g: &&mut Group<'r>| {
            let other = g.first();
            g.namespace == namespace
                && (&other.prefix, &other.also) == (&place.prefix, &place.also)
                && note(dialect, other) == note(dialect, place)
        };
        match out.iter_mut().find(same) {
            Some(group) => group.places.push(place),
            None => out.push(Group { dialect, namespace, places: vec![place] }),
        }
    }
    out
}

/// What is special about a place.
pub(super) fn note(dialect: &Dialect, place: &Place) -> &'static str {
    match (place.write && dialect.write, place.carried) {
        (false, _) => "read only",
        (true, true) => "carried: loaders of the dialect ignore it",
        (true, false) => "",
    }
}

/// A dialect with a link to its page, from a page that is `up` from the reference.
pub(super) fn link(up: &str, dialect: &Dialect) -> String {
    format!("[`{0}`]({up}dialects/{0}.md)", dialect.name)
}
