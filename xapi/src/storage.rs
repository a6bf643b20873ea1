//! What is done with disks and where they lie: creating, snapshots, changed block tracking, destroying; hosts of an SR.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::record::{Class, Host, Pbd, Sr, Vbd, Vdi, Vm};
use crate::{Error, ErrorKind, Pool, Ref, Result};

/// For how many pauses a disk that is in use is tried again to be destroyed.
const IN_USE: u32 = 24;
/// After which part of one what the control domain holds is taken from it: most often it lets go by itself, soon. A host that hangs
/// never does, and what was stopped is to be gone in seconds.
const PATIENT: u32 = 10;
/// For how many pauses a disk is waited for that a control domain still holds after a transfer.
const LETTING_GO: u32 = 6;

impl Pool {
    /// Makes a disk of the fields that XAPI has for it. The SR may make it larger than was asked for.
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn create_vdi(&self, fields: &Map<String, Value>) -> Result<Ref<Vdi>> {
        self.run("VDI.create", &[json!(fields)])?.reference()
    }

    /// Makes a disk that can be written to with what another holds.
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn clone_vdi(&self, vdi: &Ref<Vdi>) -> Result<Ref<Vdi>> {
        self.run("VDI.clone", &[json!(vdi), json!({})])?.reference()
    }

    /// Makes a disk larger, `size` in bytes, once it is let go by what transferred it.
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn resize_vdi(&self, vdi: &Ref<Vdi>, size: u64) -> Result<()> {
        self.once_let_go("VDI.resize", &[json!(vdi), size.into()])
    }

    /// Destroys a disk of ours. One that is gone is no error; from a control domain that still holds it, it is taken.
    ///
    /// # Errors
    /// As [`Pool::run`]; `VDI_IN_USE` after some minutes.
    pub fn destroy_vdi(&self, vdi: &Ref<Vdi>) -> Result<()> {
        self.destroy(vdi, "destroy", || self.free_from_control_domain(vdi))
    }

    /// Destroys what a snapshot of ours holds, and keeps what is known of its changed blocks. Its machine's snapshot has to be
    /// destroyed before.
    ///
    /// # Errors
    /// As [`Pool::run`]; `VDI_NO_CBT_METADATA` if blocks were not tracked, `VDI_IN_USE` after some minutes.
    pub fn destroy_data(&self, vdi: &Ref<Vdi>) -> Result<()> {
        self.destroy(vdi, "data_destroy", || self.free_from_control_domain(vdi))
    }

    /// Has the pool track the blocks of a disk that change. It may be on already.
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn enable_cbt(&self, vdi: &Ref<Vdi>) -> Result<()> {
        self.run("VDI.enable_cbt", &[json!(vdi)]).map(|_| ())
    }

    /// Returns the connections of a disk to control domains: exports and NBD connections make one each, and may leave it.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn control_domain_vbds(&self, vdi: &Ref<Vdi>) -> Result<Vec<Ref<Vbd>>> {
        let vbds: Vec<Ref<Vbd>> = self.field(vdi, "VBDs")?;
        let mut found = Vec::new();
        for vbd in self.records_of(&vbds)? {
            match self.field::<Vm, bool>(&vbd.vm, "is_control_domain") {
                Ok(true) => found.push(vbd.reference),
                Err(error) if !error.is_gone() => return Err(error),
                _ => {}
            }
        }
        Ok(found)
    }

    /// Takes a disk from the control domains that hold it.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn free_from_control_domain(&self, vdi: &Ref<Vdi>) -> Result<()> {
        for vbd in self.control_domain_vbds(vdi)? {
            match self.run("VBD.unplug_force", &[json!(vbd)]) {
                Err(error) if !error.is_gone() && error.code() != "DEVICE_ALREADY_DETACHED" => return Err(error),
                _ => self.destroy_vbd(&vbd)?,
            }
        }
        Ok(())
    }

    /// Returns the hosts that have an SR now.
    ///
    /// # Errors
    /// As [`Pool::call`].
    pub fn hosts_of_sr(&self, sr: &Ref<Sr>) -> Result<Vec<Ref<Host>>> {
        let pbds: Vec<Ref<Pbd>> = self.field(sr, "PBDs")?;
        let attached = self.records_of(&pbds)?.into_iter().filter(|pbd| pbd.currently_attached);
        Ok(attached.map(|pbd| pbd.fields.host).collect())
    }

    /// Returns the certificate of a host (PEM), as the pool knows it.
    ///
    /// # Errors
    /// As [`Pool::call`]; [`ErrorKind::Unsupported`] of an old pool.
    pub fn host_certificate(&self, host: &Ref<Host>) -> Result<String> {
        self.call("host.get_server_certificate", &[json!(host)])
    }

    /// Calls `method`, as a task, once the control domains have let go of disks that they transferred, which takes them seconds.
    pub(crate) fn once_let_go(&self, method: &str, arguments: &[Value]) -> Result<()> {
        let act = || self.run(method, arguments).map(|_| ());
        self.patiently(method, LETTING_GO, |error| error.code() == "VDI_IN_USE", act, |_| {})
    }

    /// Destroys an object by `way`, for as long as something holds it.
    ///
    /// After an end of which nobody knows the outcome it is simply done again: who finds nothing has what he wanted.
    pub(crate) fn destroy<C: Class>(&self, object: &Ref<C>, way: &str, free: impl Fn() -> Result<()>) -> Result<()> {
        let method = format!("{}.{way}", C::NAME);
        // What is gone is something else, which held it.
        let may_pass = |error: &Error| {
            matches!(error.code(), "VDI_IN_USE" | "OTHER_OPERATION_IN_PROGRESS" | "HANDLE_INVALID")
                || error.kind() == ErrorKind::Unknown
        };
        let act = || unless_gone(object, self.run(&method, &[json!(object)]).map(|_| ()));
        let patient = self.core.settings.pause / PATIENT;
        self.patiently(&method, IN_USE, may_pass, act, |elapsed| {
            if elapsed >= patient
                && let Err(error) = unless_gone(object, free())
            {
                tracing::debug!(%error, "a control domain does not let a disk go");
            }
        })
    }

    /// Tries something again, after longer and longer pauses, for as many of the usual ones as `most`, while it fails with what may
    /// pass; `again` is told before each try but the first how long that has been so.
    fn patiently(
        &self,
        method: &str,
        most: u32,
        may_pass: impl Fn(&Error) -> bool,
        act: impl Fn() -> Result<()>,
        again: impl Fn(Duration),
    ) -> Result<()> {
        let (begun, mut tried) = (Instant::now(), 0);
        loop {
            match act() {
                Err(error) if may_pass(&error) && begun.elapsed() < self.core.settings.pause * most => {
                    tracing::debug!(%error, "tried again");
                }
                done => return done,
            }
            // Each pause is a part of what has passed by then: no more than that is waited in vain.
            self.cancel.sleep(self.core.settings.pause_after(tried / 4), self.subject(method))?;
            tried += 1;
            again(begun.elapsed());
        }
    }
}

/// Takes an object that does not exist for one that was destroyed.
pub(crate) fn unless_gone<C>(object: &Ref<C>, done: Result<()>) -> Result<()> {
    match done {
        Err(error) if error.is_gone() && error.params().get(1).is_some_and(|gone| gone == object.as_str()) => Ok(()),
        done => done,
    }
}
