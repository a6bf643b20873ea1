//! `ova.xml`: which disks an XVA holds.
//!
//! XML in the manner of XML-RPC values: a struct with `version` and `objects`, an array of structs with `class`, `id`
//! and `snapshot` (the fields of the object). Only VM, VBD and VDI are looked at, only where they stand: nothing
//! recurses, nothing is looked for in the depth.

use std::collections::HashSet;

use roxmltree::{Document, Node, ParsingOptions};

use crate::tar::Header;
use crate::{Error, Result};

/// The name of the first entry.
pub(crate) const NAME: &str = "ova.xml";

/// The largest `ova.xml`, in bytes; real ones have some 10 KiB per disk and snapshot.
pub(crate) const MAX_SIZE: u64 = 16 << 20;

/// Nodes of XML at most: what bounds the memory the parser takes (about 100 MB), far above any VM.
const MAX_NODES: u32 = 1 << 20;

/// The largest disk, in bytes: larger than anything a pool makes, small enough for sums without overflow.
const MAX_DISK_SIZE: u64 = 1 << 56;

/// A disk as `ova.xml` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XvaDisk {
    /// Its reference within the XVA, and the folder of its chunks: `Ref:12`.
    pub reference: String,
    /// The name under which the guest sees it (`xvda`), `None` if nothing says it.
    ///
    /// It is `device` of its VBD; where that is empty, `userdevice` says it (`0` is `xvda`). `device` comes first since
    /// Xen Orchestra's own XVAs count `userdevice` from 1.
    pub user_device: Option<String>,
    /// Virtual size in bytes.
    pub size: u64,
    /// `name_label` of the VDI.
    pub name_label: String,
    /// `name_description` of the VDI.
    pub description: String,
    /// Whether it is the memory of a suspended VM, not a disk of the guest.
    pub is_memory: bool,
}

/// Says that an archive does not start with a sound `ova.xml`.
pub(crate) fn missing(found: &str) -> Error {
    Error::damaged(format!("at byte 0: {NAME} was expected, {found}"))
}

/// Parses the first header of an archive and returns the bytes of `ova.xml`, at most [`MAX_SIZE`].
///
/// # Errors
/// As [`Header::parse`]; `Damaged` if it is another entry, or longer.
pub(crate) fn size(block: &[u8; 512]) -> Result<u64> {
    let header = Header::parse(block, 0)?.ok_or_else(|| missing("there are zeroes"))?;
    if header.name != NAME {
        return Err(missing(&format!("there is '{}'", header.name.escape_debug())));
    }
    if header.size > MAX_SIZE {
        return Err(missing(&format!("it has {} bytes, more than {MAX_SIZE}", header.size)));
    }
    Ok(header.size)
}

/// Parses `ova.xml` and returns the disks in its order.
///
/// VDIs that are only in a CD drive are no disks: their content is not in the XVA.
/// Source: xen-api `ocaml/xapi/export.ml`; XO `@xen-orchestra/xva/_writeOvaXml.mjs`.
///
/// # Errors
/// `Damaged` if it is no XML of that form, a reference stands twice, or the size of a disk is no number.
pub(crate) fn parse(xml: &[u8]) -> Result<Vec<XvaDisk>> {
    let damaged = |what: String| Error::damaged(format!("{NAME}: {what}"));
    let text = std::str::from_utf8(xml).map_err(|error| damaged(format!("is not UTF-8: {error}")))?;
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|error| damaged(error.to_string()))?;
    let root = document.root_element();
    let objects = member(root, "objects")
        .and_then(|value| child(value, "array"))
        .and_then(|array| child(array, "data"))
        .ok_or_else(|| damaged("has no list of objects".to_owned()))?;

    let mut vdis = Vec::new();
    let mut vbds = Vec::new();
    let mut memories = HashSet::new();
    for object in objects.children().filter(|node| node.has_tag_name("value")) {
        let (Some(class), Some(id)) = (field(object, "class"), field(object, "id")) else { continue };
        let Some(snapshot) = member(object, "snapshot") else { continue };
        match class.as_str() {
            "VDI" => vdis.push((id, snapshot)),
            "VBD" => vbds.push(snapshot),
            "VM" => memories.extend(field(snapshot, "suspend_VDI")),
            _ => {}
        }
    }

    let vbds: Vec<Vbd> = vbds.into_iter().map(Vbd::of).collect();
    let mut disks: Vec<XvaDisk> = Vec::new();
    let mut seen = HashSet::new();
    for (reference, vdi) in vdis {
        if !seen.insert(reference.clone()) {
            return Err(damaged(format!("'{}' stands for two VDIs", reference.escape_debug())));
        }
        let mut drives = vbds.iter().filter(|vbd| vbd.vdi.as_deref() == Some(reference.as_str())).peekable();
        let has_drives = drives.peek().is_some();
        let drive = drives.find(|vbd| !vbd.is_cd);
        if has_drives && drive.is_none() {
            continue;
        }
        let size = field(vdi, "virtual_size").unwrap_or_default();
        let size = size.trim().parse().ok().filter(|size| *size <= MAX_DISK_SIZE).ok_or_else(|| {
            let (reference, size) = (reference.escape_debug(), size.escape_debug());
            damaged(format!("virtual_size of '{reference}' is '{size}', a number of bytes was expected"))
        })?;
        disks.push(XvaDisk {
            user_device: drive.and_then(|vbd| vbd.device.clone()),
            size,
            name_label: field(vdi, "name_label").unwrap_or_default(),
            description: field(vdi, "name_description").unwrap_or_default(),
            is_memory: memories.contains(&reference),
            reference,
        });
    }
    Ok(disks)
}

struct Vbd {
    vdi: Option<String>,
    is_cd: bool,
    device: Option<String>,
}

impl Vbd {
    fn of(snapshot: Node<'_, '_>) -> Self {
        let device = field(snapshot, "device").filter(|device| !device.is_empty());
        Self {
            vdi: field(snapshot, "VDI"),
            is_cd: field(snapshot, "type").is_some_and(|kind| kind.eq_ignore_ascii_case("CD")),
            device: device.or_else(|| field(snapshot, "userdevice").and_then(|number| device_name(&number))),
        }
    }
}

/// Returns the name of the drive of that number: `0` is `xvda`, `25` is `xvdz`, `26` is `xvdaa`.
fn device_name(userdevice: &str) -> Option<String> {
    let mut number = u32::from(userdevice.trim().parse::<u16>().ok()?) + 1;
    let mut letters = Vec::new();
    while number > 0 {
        number -= 1;
        letters.push(char::from(b'a' + u8::try_from(number % 26).ok()?));
        number /= 26;
    }
    Some(format!("xvd{}", letters.iter().rev().collect::<String>()))
}

fn child<'a, 'i>(node: Node<'a, 'i>, tag: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(tag))
}

/// Returns the `value` of a member of the struct in `value`.
fn member<'a, 'i>(value: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    let members = child(value, "struct")?.children().filter(|node| node.has_tag_name("member"));
    let mut named = members.filter(|member| child(*member, "name").is_some_and(|node| node.text() == Some(name)));
    child(named.next()?, "value")
}

/// Returns a member as text; numbers and booleans stand in an element of their own.
fn field(value: Node<'_, '_>, name: &str) -> Option<String> {
    let value = member(value, name)?;
    let node = value.first_element_child().unwrap_or(value);
    // Comments split a text in several nodes.
    Some(node.children().filter(Node::is_text).filter_map(|text| text.text()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(class: &str, id: &str, fields: &[(&str, &str)]) -> String {
        let fields: String = fields
            .iter()
            .map(|(name, value)| format!("<member><name>{name}</name><value>{value}</value></member>"))
            .collect();
        format!(
            "<value><struct><member><name>class</name><value>{class}</value></member><member><name>id</name>\
             <value>{id}</value></member><member><name>snapshot</name><value><struct>{fields}</struct></value>\
             </member></struct></value>"
        )
    }

    fn ova(objects: &[String]) -> String {
        format!(
            "<?xml version='1.0'?>\n<value><struct><member><name>objects</name><value><array><data>{}</data></array>\
             </value></member></struct></value>",
            objects.concat()
        )
    }

    #[test]
    fn disks_have_the_names_the_guest_sees_and_cd_drives_are_none() {
        let xml = ova(&[
            object("VM", "Ref:0", &[("suspend_VDI", "Ref:9"), ("name_label", "a VM")]),
            object("VBD", "Ref:1", &[("VDI", "Ref:2"), ("userdevice", "0"), ("type", "Disk"), ("device", "")]),
            object(
                "VDI",
                "Ref:2",
                &[("virtual_size", "1048576"), ("name_label", "a &lt;b&gt;"), ("name_description", "d")],
            ),
            object("VBD", "Ref:3", &[("VDI", "Ref:4"), ("userdevice", "3"), ("type", "CD")]),
            object("VDI", "Ref:4", &[("virtual_size", "700000000"), ("name_label", "a.iso")]),
            object("VBD", "Ref:5", &[("VDI", "Ref:6"), ("userdevice", "2"), ("type", "Disk"), ("device", "xvdb")]),
            object("VDI", "Ref:6", &[("virtual_size", "<int>512</int>")]),
            object("VDI", "Ref:9", &[("virtual_size", "4096")]),
        ]);
        let disks = parse(xml.as_bytes()).unwrap();
        let told: Vec<_> = disks
            .iter()
            .map(|d| (d.reference.as_str(), d.user_device.as_deref(), d.size, d.name_label.as_str(), d.is_memory))
            .collect();
        assert_eq!(
            told,
            [
                ("Ref:2", Some("xvda"), 1_048_576, "a <b>", false),
                ("Ref:6", Some("xvdb"), 512, "", false),
                ("Ref:9", None, 4096, "", true),
            ]
        );
        assert_eq!(disks[0].description, "d");
    }

    #[test]
    fn drives_are_counted_in_letters() {
        for (number, name) in [("0", Some("xvda")), ("25", Some("xvdz")), ("26", Some("xvdaa")), ("autodetect", None)] {
            assert_eq!(device_name(number).as_deref(), name, "{number}");
        }
    }

    #[test]
    fn what_is_no_sound_ova_xml_is_refused() {
        let deep = "<value>".repeat(100_000);
        let wide = format!("<value>{}</value>", "<a/>".repeat(1 << 21));
        let bomb = "<!DOCTYPE v [<!ENTITY a 'aaaaaaaa'>]><value>&a;</value>";
        let vdi = |size: &str| object("VDI", "Ref:2", &[("virtual_size", size)]);
        let twice = ova(&[vdi("1"), vdi("2")]);
        let sizes = ["-1", "", "1e9", "99999999999999999999999"].map(|size| ova(&[vdi(size)]));
        let bad = ["", "<value/>", "<value>", "\u{1}", &deep, &wide, bomb, &twice];
        for xml in bad.into_iter().chain(sizes.iter().map(String::as_str)) {
            let shown: String = xml.chars().take(60).collect();
            let error = parse(xml.as_bytes()).expect_err(&shown);
            assert_eq!(error.kind(), crate::ErrorKind::Damaged, "{shown}");
            assert!(error.to_string().starts_with("ova.xml: "), "{error}");
        }
        assert!(parse(b"<value>\xff</value>").is_err());
    }
}
