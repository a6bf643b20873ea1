// Xen Orchestra's client of XAPI logs into a simulated pool, watches it, takes a snapshot, exports and imports a disk.
//
// usage: node judge.mjs URL USER PASSWORD VM      a pool of xapi-simulator with a machine of one disk
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { createClient } from 'xen-api'

const [url, username, password, name] = process.argv.slice(2)
const xapi = createClient({ url, auth: { user: username, password }, allowUnauthorized: true, syncStackTraces: false })

const collect = async response => {
  const chunks = []
  for await (const chunk of response.body) chunks.push(chunk)
  return Buffer.concat(chunks)
}
// What is the same in two exports of the same content: the table and the blocks, not the footer's uuid.
const digest = vhd => createHash('sha256').update(vhd.subarray(2048, vhd.length - 512)).digest('hex')

await xapi.connect()
const objects = () => Object.values(xapi.objects.all)
const eventually = async (what, find) => {
  for (let tries = 0; tries < 200; ++tries) {
    const found = find()
    if (found) return found
    await new Promise(resolve => setTimeout(resolve, 50))
  }
  throw new Error(`${what} did not come within 10 seconds`)
}
await xapi.objectsFetched

const vm = objects().find(object => object.$type === 'VM' && object.name_label === name && !object.is_a_snapshot)
assert.equal(vm.power_state, 'Running')
const vdi = vm.$VBDs.find(vbd => vbd.type === 'Disk').$VDI
assert.equal(xapi.pool.$master.address, new URL(url).hostname)

// A task and the events of what it makes.
const snapshotRef = await xapi.callAsync('VM.snapshot', vm.$ref, 'judged')
const snapshot = await eventually('the snapshot', () => objects().find(object => object.$ref === snapshotRef))
assert.equal(snapshot.is_a_snapshot, true)
assert.equal(snapshot.is_a_template, true)
assert.equal(snapshot.$snapshot_of.$ref, vm.$ref)
const copy = await eventually('its disk', () => snapshot.$VBDs.find(vbd => vbd?.type === 'Disk')?.$VDI)
assert.equal(copy.$snapshot_of.$ref, vdi.$ref)
assert.equal(copy.virtual_size, vdi.virtual_size)
await xapi.setFieldEntry('VM', snapshotRef, 'other_config', 'xo:backup:datetime', '20260102T03:04:05Z')
await xapi.barrier(snapshotRef)
assert.equal(xapi.getObject(snapshotRef).other_config['xo:backup:datetime'], '20260102T03:04:05Z')

// A whole disk out, and into another one.
const task = await xapi.createTask('export')
const exported = await collect(
  await xapi.getResource('/export_raw_vdi/', { query: { vdi: copy.$ref, format: 'vhd' }, task })
)
await xapi.watchTask(task)
assert.equal(exported.subarray(0, 8).toString(), 'conectix')
assert.deepEqual(exported.subarray(0, 512), exported.subarray(exported.length - 512))
const target = await xapi.call('VDI.create', {
  name_label: 'imported', SR: vdi.SR, virtual_size: String(vdi.virtual_size), type: 'user',
  sharable: false, read_only: false, other_config: {},
})
await xapi.putResource(exported, '/import_raw_vdi/', {
  query: { vdi: target, format: 'vhd' }, task: await xapi.createTask('import'),
})
await eventually('its detachment', () => xapi.getObject(target, null)?.$VBDs.length === 0)
const again = await collect(
  await xapi.getResource('/export_raw_vdi/', { query: { vdi: target, format: 'vhd' }, task: await xapi.createTask('again') })
)
assert.equal(digest(again), digest(exported))

// A machine out as an XVA.
const archive = await collect(
  await xapi.getResource('/export/', { query: { ref: snapshotRef }, task: await xapi.createTask('archive') })
)
assert.equal(archive.subarray(0, 7).toString(), 'ova.xml')

// Back to the snapshot: the same machine, halted, with another disk, which the snapshot's is of now.
await xapi.call('VM.add_to_blocked_operations', vm.$ref, 'reverting', 'judged')
await assert.rejects(xapi.callAsync('VM.revert', snapshotRef), { code: 'OPERATION_BLOCKED', params: [vm.$ref, 'judged'] })
await xapi.call('VM.remove_from_blocked_operations', vm.$ref, 'reverting')
await xapi.callAsync('VM.revert', snapshotRef)
const reverted = await eventually('another disk', () =>
  xapi.getObject(vm.$ref).$VBDs.find(vbd => vbd?.type === 'Disk' && vbd.VDI !== vdi.$ref)?.$VDI
)
await eventually('its halt', () => xapi.getObject(vm.$ref).power_state === 'Halted')
await eventually('its snapshot', () => xapi.getObject(copy.$ref).snapshot_of === reverted.$ref)
assert(xapi.getObject(vm.$ref).allowed_operations.includes('start'))
await xapi.callAsync('VM.start', vm.$ref, false, false)
await eventually('its start', () => xapi.getObject(vm.$ref).power_state === 'Running')

// What is wrong is an error with its code.
await assert.rejects(xapi.call('VDI.get_record', 'OpaqueRef:none'), { code: 'HANDLE_INVALID', params: ['VDI', 'OpaqueRef:none'] })
await assert.rejects(xapi.call('VM.fly', vm.$ref), { code: 'MESSAGE_METHOD_UNKNOWN' })

await xapi.callAsync('VM.destroy', snapshotRef)
await eventually('its deletion', () => xapi.getObject(snapshotRef, null) === null)
for (const disk of [copy.$ref, target]) {
  for (let tries = 0; ; ++tries) {
    try {
      await xapi.callAsync('VDI.destroy', disk)
      break
    } catch (error) {
      if (error.code !== 'VDI_IN_USE' || tries === 100) throw error
      await new Promise(resolve => setTimeout(resolve, 50))
    }
  }
}
await xapi.disconnect()
console.log(`xen-api: ${exported.length} bytes of a disk and ${archive.length} of a machine, as expected`)
