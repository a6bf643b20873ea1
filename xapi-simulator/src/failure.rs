//! Errors as XAPI answers them: a code and texts.

use crate::schema::Class;
use crate::value::Reference;

/// What a call fails with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For example `HANDLE_INVALID`.
    pub code: String,
    /// What the code is about, in an order that each code has.
    pub params: Vec<String>,
}

/// What calls answer.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// Returns an error with any code.
    pub fn new<P: Into<String>>(code: &str, params: impl IntoIterator<Item = P>) -> Failure {
        Failure { code: code.to_owned(), params: params.into_iter().map(Into::into).collect() }
    }

    /// The object is not there, or no longer.
    pub fn gone(class: Class, reference: &str) -> Failure {
        Failure::new("HANDLE_INVALID", [class.name(), reference])
    }

    /// No object has this uuid.
    pub fn no_uuid(class: Class, uuid: &str) -> Failure {
        Failure::new("UUID_INVALID", [class.name(), uuid])
    }

    /// The session ended or never was.
    pub fn session(reference: &str) -> Failure {
        Failure::new("SESSION_INVALID", [reference])
    }

    /// Something has the VDI attached.
    pub fn in_use(vdi: &Reference, operation: &str) -> Failure {
        Failure::new("VDI_IN_USE", [vdi.as_str(), operation])
    }

    /// The machine is not in one of the states that the call needs.
    pub fn power_state(vm: &Reference, expected: &[&str], actual: &str) -> Failure {
        let expected = expected.join(", ").to_ascii_lowercase();
        Failure::new("VM_BAD_POWER_STATE", [vm.as_str(), &expected, &actual.to_ascii_lowercase()])
    }

    /// The storage manager failed with one of its numbers.
    pub fn storage(number: u32, text: &str) -> Failure {
        Failure::new(&format!("SR_BACKEND_FAILURE_{number}"), ["", text, ""])
    }

    /// The SR is full.
    pub fn no_space() -> Failure {
        Failure::storage(44, "There is insufficient space")
    }

    /// An argument or a field of a record has another type.
    pub fn kind(name: &str) -> Failure {
        Failure::new("FIELD_TYPE_ERROR", [name])
    }

    /// The message is not known.
    pub fn no_method(name: &str) -> Failure {
        Failure::new("MESSAGE_METHOD_UNKNOWN", [name])
    }

    /// What is not an error of the API.
    pub fn internal(text: &str) -> Failure {
        Failure::new("INTERNAL_ERROR", [text])
    }

    /// A helper that moves a disk's bytes failed, whatever the reason.
    pub fn device() -> Failure {
        Failure::new("VDI_IO_ERROR", ["Device I/O errors"])
    }

    /// Returns the code and its texts in one list, as tasks and JSON-RPC 1.0 have it.
    pub fn to_list(&self) -> Vec<String> {
        std::iter::once(self.code.clone()).chain(self.params.iter().cloned()).collect()
    }
}
