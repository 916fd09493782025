//! Where a dialect puts the components of families.

use super::raw::{self, OneOrMany};
use super::source::invalid;
use super::{Component, Family, Place};
use crate::error::Result;

/// Where a dialect puts the components of the family of that number. What the family's own table says comes first.
pub(super) fn compile(
    raw: &raw::Dialect,
    family: usize,
    table: &raw::Family,
    components: &[Component],
) -> Result<Vec<Place>> {
    let written = table.dialects.as_ref().is_none_or(|all| all.contains(&raw.name));
    let mut places = Vec::new();
    for (c, component) in components.iter().enumerate() {
        let found = raw.place.iter().filter(|place| is_for(place, &table.name, component));
        let mut found: Vec<Place> = found.filter_map(|place| general(place, family, c, component, written)).collect();
        if let Some(exception) = table.component.get(c).and_then(|part| part.places.get(&raw.name)) {
            apply(&table.name, exception, (family, c), component, &mut found)?;
        }
        places.extend(found);
    }
    Ok(places)
}

/// Names in a dialect's table are those of something.
pub(super) fn check(raw: &raw::Dialect, families: &[Family]) -> Result<()> {
    for place in &raw.place {
        let wrong = |what: String| Err(invalid(&raw.name, what));
        for name in place.families.iter().flatten() {
            let all: Vec<&Family> = families.iter().filter(|f| f.name == *name).collect();
            if all.is_empty() {
                return wrong(format!("no family is called `{name}`"));
            }
            let mut components = all.iter().flat_map(|f| f.components.iter()).filter(|c| is_part(place, c)).peekable();
            if components.peek().is_none() {
                let wanted = place.component.as_ref().map_or(&[][..], OneOrMany::as_slice);
                return wrong(format!("`{name}` has no component {wanted:?}"));
            }
            if !components.any(|c| namespace(place, c).is_some()) {
                return wrong(format!("no component of `{name}` has a namespace {:?}", place.namespace.as_slice()));
            }
        }
    }
    Ok(())
}

fn is_for(place: &raw::Place, family: &String, component: &Component) -> bool {
    place.families.as_ref().is_none_or(|all| all.contains(family)) && is_part(place, component)
}

fn is_part(place: &raw::Place, component: &Component) -> bool {
    place.component.as_ref().is_none_or(|all| all.as_slice().contains(&component.name))
        && place.r#use.as_ref().is_none_or(|name| component.shared.as_ref() == Some(name))
}

/// The first of the wanted namespaces that the component has.
fn namespace(place: &raw::Place, component: &Component) -> Option<usize> {
    place.namespace.as_slice().iter().find_map(|name| component.namespace(name))
}

fn general(place: &raw::Place, family: usize, number: usize, component: &Component, written: bool) -> Option<Place> {
    let named = |text: &String| text.replace("{component}", &component.name);
    Some(Place {
        family,
        component: number,
        namespace: namespace(place, component)?,
        prefix: named(&place.prefix),
        also: place.also.iter().map(named).collect(),
        carried: place.carried,
        spelled_as: place.spelled_as.clone(),
        // What a dialect does with every family it writes only for those that want it.
        write: place.write && (written || place.families.is_some()),
    })
}

/// What a family's table says of one component replaces what the dialect says first.
fn apply(
    file: &str,
    exception: &raw::Exception,
    (family, number): (usize, usize),
    component: &Component,
    found: &mut Vec<Place>,
) -> Result<()> {
    if found.is_empty() {
        if exception.prefix.is_none() {
            return Err(invalid(file, format!("`{}` needs a prefix where the dialect has none", component.name)));
        }
        found.push(Place {
            family,
            component: number,
            namespace: 0,
            prefix: String::new(),
            also: Vec::new(),
            carried: false,
            spelled_as: None,
            write: true,
        });
    }
    let place = &mut found[0];
    if let Some(prefix) = &exception.prefix {
        let (first, also) = prefix.as_slice().split_first().ok_or_else(|| invalid(file, "a place needs a prefix"))?;
        (place.prefix, place.also) = (first.clone(), also.to_vec());
    }
    if let Some(name) = &exception.namespace {
        let missing = || invalid(file, format!("`{}` has no namespace `{name}`", component.name));
        place.namespace = component.namespace(name).ok_or_else(missing)?;
    }
    place.carried = exception.carried.unwrap_or(place.carried);
    place.write = exception.write.unwrap_or(place.write);
    Ok(())
}
