#!/usr/bin/env node
// How fast Xen Orchestra merges two images, with what its configuration says by default: scripts/bench compares.
//
// usage: merge.mjs FOLDER BASE CHILD     names of VHDs or aliases in FOLDER; prints the seconds it took

import { resolve } from 'node:path'
import { mergeVhdChain } from 'vhd-lib/merge.js'

import { CONFIG, openRemote } from './lib/xo.mjs'

const [folder, ...chain] = process.argv.slice(2)
const { mergeBlockConcurrency } = CONFIG
const { handler, dispose } = await openRemote(resolve(folder))
const start = performance.now()
await mergeVhdChain(handler, chain, { mergeBlockConcurrency, removeUnused: true })
console.log((performance.now() - start) / 1000)
await dispose()
