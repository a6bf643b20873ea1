//! All objects, each with the generations in which it was made and last changed.
//!
//! One counter numbers all changes. What was deleted is remembered for a while, as `(reference, created, deleted)`, so that
//! [events](crate::event) can tell deletions to who knew the object. A field that refers to another object and the set that lists it
//! there change together, and both objects get the change's generation.

use crate::failure::{Failure, Outcome};
use crate::random::fresh_uuid;
use crate::schema::Class;
use crate::value::{Reference, Value};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// A record: all fields of its class.
pub type Record = BTreeMap<&'static str, Value>;

/// How many deletions of a class are remembered at most, and how many are left then.
///
/// Source: xen-api `ocaml/database/db_cache_types.ml`; clients see lost ones by `valid_ref_counts`.
const DELETIONS: (usize, usize) = (1000, 500);

/// An object.
#[derive(Clone, Debug)]
pub struct Object {
    /// The generation that made it.
    pub created: u64,
    /// The generation that changed it last.
    pub modified: u64,
    /// Its fields.
    pub record: Record,
}

/// A deletion that is remembered.
#[derive(Clone, Debug)]
pub struct Deletion {
    /// What was deleted.
    pub reference: Reference,
    /// The generation that had made it.
    pub created: u64,
    /// The generation that deleted it.
    pub deleted: u64,
}

#[derive(Debug, Default)]
struct Table {
    objects: BTreeMap<Reference, Object>,
    uuids: HashMap<String, Reference>,
    deletions: VecDeque<Deletion>,
}

/// The objects of a pool.
#[derive(Debug)]
pub struct Store {
    tables: BTreeMap<Class, Table>,
    generation: u64,
}

impl Default for Store {
    fn default() -> Store {
        Store::new()
    }
}

impl Store {
    /// Returns an empty one.
    pub fn new() -> Store {
        Store { tables: Class::ALL.into_iter().map(|class| (class, Table::default())).collect(), generation: 1 }
    }

    /// Returns the generation of the last change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Makes an object of starting values and `fields`.
    ///
    /// # Panics
    /// If the class has no such field.
    pub fn create(&mut self, class: Class, fields: impl IntoIterator<Item = (&'static str, Value)>) -> Reference {
        let reference = Reference::from(format!("OpaqueRef:{}", fresh_uuid()).as_str());
        let mut record = class.blank();
        for (name, value) in fields {
            assert!(record.insert(name, value).is_some(), "{} has no field {name}", class.name());
        }
        if record["uuid"] == Value::void() {
            record.insert("uuid", fresh_uuid().to_string().into());
        }
        self.generation += 1;
        let generation = self.generation;
        let uuid = text_of(&record["uuid"]).to_owned();
        let links: Vec<_> = links(class, &record);
        let table = self.table(class);
        table.uuids.insert(uuid, reference.clone());
        table.objects.insert(reference.clone(), Object { created: generation, modified: generation, record });
        for (field, target) in links {
            self.link(class, field, &reference, &target);
        }
        reference
    }

    /// Removes an object; what refers to it keeps doing so, what lists it does not. Returns what it was.
    pub fn destroy(&mut self, class: Class, reference: &Reference) -> Option<Object> {
        let object = self.table(class).objects.remove(reference)?;
        self.generation += 1;
        let deleted = self.generation;
        for (field, target) in links(class, &object.record) {
            self.unlink(class, field, reference, &target);
        }
        let table = self.table(class);
        table.uuids.remove(text_of(&object.record["uuid"]));
        table.deletions.push_back(Deletion { reference: reference.clone(), created: object.created, deleted });
        if table.deletions.len() > DELETIONS.0 {
            table.deletions.drain(..table.deletions.len() - DELETIONS.1);
        }
        Some(object)
    }

    /// Forgets all objects of a class without a trace, as those that are not persistent do when the toolstack restarts.
    pub fn forget(&mut self, class: Class) {
        self.generation += 1;
        *self.table(class) = Table::default();
    }

    /// Marks an object as changed. Returns whether it is there.
    pub fn touch(&mut self, class: Class, reference: &Reference) -> bool {
        self.generation += 1;
        let generation = self.generation;
        match self.table(class).objects.get_mut(reference) {
            Some(object) => {
                object.modified = generation;
                true
            }
            None => false,
        }
    }

    /// Sets a field.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    ///
    /// # Panics
    /// If the class has no such field.
    pub fn set(
        &mut self,
        class: Class,
        reference: &Reference,
        field: &'static str,
        value: impl Into<Value>,
    ) -> Outcome<()> {
        let value = value.into();
        let before = self.value(class, reference, field)?.clone();
        if before == value {
            self.touch(class, reference);
            return Ok(());
        }
        if let Value::Text(target) = &before {
            self.unlink(class, field, reference, &Reference::from(target.as_str()));
        }
        let target = value.as_text().map(Reference::from);
        self.generation += 1;
        let generation = self.generation;
        if let Some(object) = self.table(class).objects.get_mut(reference) {
            object.modified = generation;
            object.record.insert(field, value);
        }
        if let Some(target) = target {
            self.link(class, field, reference, &target);
        }
        Ok(())
    }

    /// Changes a field in place.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn edit<T>(
        &mut self,
        class: Class,
        reference: &Reference,
        field: &'static str,
        change: impl FnOnce(&mut Value) -> T,
    ) -> Outcome<T> {
        let mut value = self.value(class, reference, field)?.clone();
        let result = change(&mut value);
        self.set(class, reference, field, value)?;
        Ok(result)
    }

    /// Returns an object.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn object(&self, class: Class, reference: &Reference) -> Outcome<&Object> {
        self.find(class, reference).ok_or_else(|| Failure::gone(class, reference.as_str()))
    }

    /// Returns an object, if it is there.
    pub fn find(&self, class: Class, reference: &Reference) -> Option<&Object> {
        self.tables.get(&class)?.objects.get(reference)
    }

    /// Returns what has this uuid.
    ///
    /// # Errors
    /// `UUID_INVALID`.
    pub fn by_uuid(&self, class: Class, uuid: &str) -> Outcome<Reference> {
        self.tables[&class].uuids.get(uuid).cloned().ok_or_else(|| Failure::no_uuid(class, uuid))
    }

    /// Returns what `text` names, by its reference or its uuid, as the parameters of HTTP handlers do.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn by_either(&self, class: Class, text: &str) -> Outcome<Reference> {
        let reference = Reference::from(text);
        if self.find(class, &reference).is_some() {
            return Ok(reference);
        }
        self.by_uuid(class, text).map_err(|_| Failure::gone(class, text))
    }

    /// Goes through the objects of a class, in the order of their references.
    pub fn all(&self, class: Class) -> impl Iterator<Item = (&Reference, &Object)> {
        self.tables[&class].objects.iter()
    }

    /// Returns how many objects of a class there are.
    pub fn count(&self, class: Class) -> usize {
        self.tables[&class].objects.len()
    }

    /// Returns what is remembered of deletions, oldest first.
    pub fn deletions(&self, class: Class) -> impl Iterator<Item = &Deletion> {
        self.tables[&class].deletions.iter()
    }

    /// Returns the value of a field.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    ///
    /// # Panics
    /// If the class has no such field.
    pub fn value(&self, class: Class, reference: &Reference, field: &str) -> Outcome<&Value> {
        let object = self.object(class, reference)?;
        Ok(object.record.get(field).unwrap_or_else(|| panic!("{} has no field {field}", class.name())))
    }

    /// Returns a text.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn text(&self, class: Class, reference: &Reference, field: &str) -> Outcome<&str> {
        self.value(class, reference, field).map(text_of)
    }

    /// Returns a reference.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn reference(&self, class: Class, reference: &Reference, field: &str) -> Outcome<Reference> {
        self.text(class, reference, field).map(Reference::from)
    }

    /// Returns a flag.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn flag(&self, class: Class, reference: &Reference, field: &str) -> Outcome<bool> {
        self.value(class, reference, field).map(|value| *value == Value::Bool(true))
    }

    /// Returns a size or a count.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn size(&self, class: Class, reference: &Reference, field: &str) -> Outcome<u64> {
        self.value(class, reference, field).map(|value| match value {
            Value::Int(number) => u64::try_from(*number).unwrap_or(0),
            _ => 0,
        })
    }

    /// Returns the texts of a set.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn texts(&self, class: Class, reference: &Reference, field: &str) -> Outcome<Vec<String>> {
        let members = self.value(class, reference, field)?.as_set().unwrap_or(&[]);
        Ok(members.iter().filter_map(Value::as_text).map(str::to_owned).collect())
    }

    /// Returns the references of a set.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn references(&self, class: Class, reference: &Reference, field: &str) -> Outcome<Vec<Reference>> {
        Ok(self.texts(class, reference, field)?.iter().map(|text| Reference::from(text.as_str())).collect())
    }

    /// Returns the entry of a map.
    ///
    /// # Errors
    /// `HANDLE_INVALID`.
    pub fn entry(&self, class: Class, reference: &Reference, field: &str, key: &str) -> Outcome<Option<&str>> {
        Ok(self.value(class, reference, field)?.as_map().and_then(|entries| entries.get(key)).and_then(Value::as_text))
    }

    fn table(&mut self, class: Class) -> &mut Table {
        self.tables.entry(class).or_default()
    }

    fn link(&mut self, class: Class, field: &'static str, from: &Reference, to: &Reference) {
        self.relate(class, field, to, |members| members.push(from.into()));
    }

    fn unlink(&mut self, class: Class, field: &'static str, from: &Reference, to: &Reference) {
        self.relate(class, field, to, |members| members.retain(|member| member.as_text() != Some(from.as_str())));
    }

    fn relate(&mut self, class: Class, field: &'static str, to: &Reference, change: impl FnOnce(&mut Vec<Value>)) {
        let Some((target_class, list)) = class.counterpart(field) else { return };
        self.generation += 1;
        let generation = self.generation;
        if let Some(target) = self.table(target_class).objects.get_mut(to) {
            if let Some(Value::Set(members)) = target.record.get_mut(list) {
                change(members);
                target.modified = generation;
            }
        }
    }
}

fn text_of(value: &Value) -> &str {
    value.as_text().unwrap_or("")
}

/// Returns the fields of a record whose targets list what refers to them, with those targets.
fn links(class: Class, record: &Record) -> Vec<(&'static str, Reference)> {
    record
        .iter()
        .filter(|(field, _)| class.counterpart(field).is_some())
        .map(|(&field, value)| (field, Reference::from(text_of(value))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_refers_and_what_lists_change_together() {
        let mut store = Store::new();
        let first = store.create(Class::Vdi, []);
        let second = store.create(Class::Vdi, []);
        let vbd = store.create(Class::Vbd, [("VDI", Value::from(&first))]);
        assert_eq!(store.references(Class::Vdi, &first, "VBDs").unwrap(), std::slice::from_ref(&vbd));
        let before = store.generation();
        store.set(Class::Vbd, &vbd, "VDI", &second).unwrap();
        assert_eq!(store.references(Class::Vdi, &first, "VBDs").unwrap(), []);
        assert_eq!(store.references(Class::Vdi, &second, "VBDs").unwrap(), std::slice::from_ref(&vbd));
        for vdi in [&first, &second] {
            assert!(store.object(Class::Vdi, vdi).unwrap().modified > before);
        }
        store.destroy(Class::Vbd, &vbd);
        assert_eq!(store.references(Class::Vdi, &second, "VBDs").unwrap(), []);
        assert_eq!(store.deletions(Class::Vbd).count(), 1);
    }
}
