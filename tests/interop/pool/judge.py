"""XenServer's client of XAPI, which speaks XML-RPC, logs into a simulated pool, watches it and takes a snapshot.

usage: judge.py URL USER PASSWORD VM      a pool of xapi-simulator with a machine of one disk
"""

import ssl
import sys
import urllib.request

import XenAPI

url, user, password, name = sys.argv[1:]
session = XenAPI.Session(url, ignore_ssl=True)
try:
    XenAPI.Session(url, ignore_ssl=True).login_with_password(user, "wrong")
    raise SystemExit("a wrong password was taken")
except XenAPI.Failure as failure:
    assert failure.details[0] == "SESSION_AUTHENTICATION_FAILED", failure.details
session.login_with_password(user, password, "1.0", "judge")
api = session.xenapi

(vm,) = [ref for ref, record in api.VM.get_all_records().items()
         if record["name_label"] == name and not record["is_a_snapshot"]]
record = api.VM.get_record(vm)
assert record["power_state"] == "Running" and record["VCPUs_max"] == "1", record
assert record["is_a_template"] is False and record["HVM_shadow_multiplier"] == 1.0
(vdi,) = [api.VBD.get_VDI(vbd) for vbd in record["VBDs"] if api.VBD.get_type(vbd) == "Disk"]
size = int(api.VDI.get_virtual_size(vdi))

token = api.event.inject("pool", api.pool.get_all()[0])
task = api.Async.VM.snapshot(vm, "judged")
seen = {}
while seen.get(task, {}).get("status") != "success":
    answer = getattr(api.event, "from")(["task", "vm"], token, 10.0)
    token = answer["token"]
    for event in answer["events"]:
        assert event["class"] in ("task", "vm"), event
        seen[event["ref"]] = event.get("snapshot")
    assert answer["valid_ref_counts"]["pool"] == "1", answer["valid_ref_counts"]
snapshot = seen[task]["result"].removeprefix("<value>").removesuffix("</value>")
assert seen[snapshot]["snapshot_of"] == vm
assert str(api.VM.get_snapshot_time(snapshot)) > "20200101T00:00:00Z"
api.task.destroy(task)

(copy,) = [api.VBD.get_VDI(vbd) for vbd in api.VM.get_VBDs(snapshot) if api.VBD.get_type(vbd) == "Disk"]
trust = ssl.create_default_context()
trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
query = f"/export_raw_vdi/?session_id={session._session}&vdi={api.VDI.get_uuid(copy)}&format=raw"
with urllib.request.urlopen(url + query, context=trust) as response:
    length = 0
    while piece := response.read(1 << 20):
        length += len(piece)
assert length == size, (length, size)

whole = api.VDI.copy(copy, api.VDI.get_SR(copy), "OpaqueRef:NULL", "OpaqueRef:NULL")
assert int(api.VDI.get_virtual_size(whole)) == size
assert "vhd-parent" not in api.VDI.get_sm_config(whole)
api.VDI.destroy(whole)

api.VM.suspend(vm)
assert api.VDI.get_type(api.VM.get_suspend_VDI(vm)) == "suspend"
try:
    api.VM.start(vm, False, False)
    raise SystemExit("a suspended machine was started")
except XenAPI.Failure as failure:
    assert failure.details == ["VM_BAD_POWER_STATE", vm, "halted", "suspended"], failure.details
api.VM.resume(vm, False, False)
assert "suspend" in api.VM.get_allowed_operations(vm)
api.VM.set_bios_strings(vm, {"bios-vendor": "judge"})
assert api.VM.get_bios_strings(vm)["system-product-name"] == "HVM domU"

try:
    api.VDI.data_destroy(copy)
    raise SystemExit("data was destroyed without changed block tracking")
except XenAPI.Failure as failure:
    assert failure.details == ["VDI_NO_CBT_METADATA", copy], failure.details

api.VM.destroy(snapshot)
while True:
    try:
        api.VDI.destroy(copy)
        break
    except XenAPI.Failure as failure:
        assert failure.details[0] == "VDI_IN_USE", failure.details
try:
    api.VM.get_record(snapshot)
    raise SystemExit("a machine that was destroyed has a record")
except XenAPI.Failure as failure:
    assert failure.details == ["HANDLE_INVALID", "VM", snapshot], failure.details
session.logout()
print(f"XenAPI: {length} bytes of a disk, as expected")
