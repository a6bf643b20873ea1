#!/usr/bin/env node
// Reads the `.vhd` views of a mount with Xen Orchestra's own code, as a restore does.
//
// usage: views.mjs MOUNTPOINT EXPECTED_DIR WORK_DIR
//
// Each view is copied out first: vhd-lib opens a VHD file for writing too.

import { basename, join, resolve } from 'node:path'
import { readdir, readFile, rm } from 'node:fs/promises'

import { copySparse, sha256OfFile } from './lib/files.mjs'
import { openRemote } from './lib/xo.mjs'
import { readDisk } from './lib/xo-read.mjs'

const [mountpoint, expectedDir, work] = process.argv.slice(2).map(path => resolve(path))
const { vms } = JSON.parse(await readFile(join(expectedDir, 'index.json'), 'utf8'))
const { handler, dispose } = await openRemote(work)

let equal = 0
let wrong = 0
for (const vm of vms) {
  const backup = vm.backups.at(-1)
  if (backup.mode === 'full' || backup.disks.some(({ state }) => state !== 'ok')) {
    continue
  }
  const time = basename(backup.metadata).replace(/^(\d{4})(\d\d)(\d\d)(T\d+Z).*$/, '$1-$2-$3$4')
  const folder = join(mountpoint, 'by-uuid', vm.uuid, time, 'disks')
  const truths = new Set(backup.disks.map(({ sha256, virtualSize }) => `${virtualSize} ${sha256}`))
  const views = (await readdir(folder)).filter(name => name.endsWith('.vhd'))
  if (views.length !== backup.disks.length) {
    console.log(`${vm.name}: ${views.length} views of ${backup.disks.length} disks`)
    wrong++
  }
  for (const name of views) {
    await copySparse(join(folder, name), join(work, 'view.vhd'))
    const { virtualSize, sha256, error, rawContent } = await readDisk(handler, '/view.vhd')
    const raw = await sha256OfFile(join(folder, name.replace(/vhd$/, 'raw')))
    await rm(join(work, 'view.vhd'))
    if (error === undefined && raw.sha256 === sha256 && raw.size === virtualSize && truths.has(`${virtualSize} ${sha256}`)) {
      equal++
    } else {
      wrong++
      console.log(`${vm.name} ${name}: XO reads ${error ?? `${virtualSize} bytes, ${sha256}`}; the raw file has ${raw.size}, ${raw.sha256}`, rawContent ?? '')
    }
  }
}
console.log(`views: XO reads ${equal} right, ${wrong} not`)
await dispose()
process.exit(wrong === 0 && equal > 0 ? 0 : 1)
