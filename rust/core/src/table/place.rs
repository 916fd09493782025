//! Where a dialect puts the components of families.

use super::load::invalid;
use super::raw::{self, OneOrMany};
use super::{Component, Family, Place};
use crate::error::Result;

/// The places of a dialect. Those of a family's own table come in front of what the dialect does with all families.
pub(super) fn compile(file: &str, raw: &raw::Dialect, families: &[Family], own: &[raw::Family]) -> Result<Vec<Place>> {
    check_names(file, raw, families)?;
    let mut places = Vec::new();
    for (f, family) in families.iter().enumerate() {
        let table = own.iter().find(|t| t.name == family.name);
        let written = table.and_then(|t| t.dialects.as_ref()).is_none_or(|all| all.contains(&raw.name));
        for (c, component) in family.components.iter().enumerate() {
            let exception = table.and_then(|t| t.component.get(c)).and_then(|p| p.places.get(&raw.name));
            let found = raw.place.iter().filter(|place| is_for(place, family, component));
            let mut found: Vec<Place> = found.filter_map(|place| general(place, f, c, component, written)).collect();
            if let Some(exception) = exception {
                apply(file, exception, (f, c), component, &mut found)?;
            }
            places.extend(found);
        }
    }
    Ok(places)
}

/// Names in a dialect's table are those of something.
fn check_names(file: &str, raw: &raw::Dialect, families: &[Family]) -> Result<()> {
    for place in &raw.place {
        let named = place.families.iter().flatten();
        for name in named {
            let mut all = families.iter().filter(|f| f.name == *name).peekable();
            if all.peek().is_none() {
                return Err(invalid(file, format!("no family is called `{name}`")));
            }
            let mut components = all.flat_map(|f| &f.components).filter(|c| is_part(place, c)).peekable();
            if components.peek().is_none() {
                let wanted = place.component.as_ref().map_or(&[][..], OneOrMany::as_slice);
                return Err(invalid(file, format!("`{name}` has no component {wanted:?}")));
            }
            if !components.any(|c| namespace(place, c).is_some()) {
                let wanted = place.namespace.as_slice();
                return Err(invalid(file, format!("no component of `{name}` has a namespace {wanted:?}")));
            }
        }
    }
    Ok(())
}

fn is_for(place: &raw::Place, family: &Family, component: &Component) -> bool {
    place.families.as_ref().is_none_or(|all| all.contains(&family.name)) && is_part(place, component)
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
