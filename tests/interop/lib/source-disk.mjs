import { open, rm } from 'node:fs/promises'
import { RandomAccessDisk } from '@xen-orchestra/disk-transform'

import { listChangedBlocks } from './pattern-disk.mjs'
import { MIB, sha256OfFile } from './files.mjs'

const BLOCK_SIZE = 2 * MIB

// What XO gets from XAPI for one snapshot of a disk: all blocks in use, or those
// which changed since a base.
export class RawSnapshotDisk extends RandomAccessDisk {
  #basePath
  #blocks
  #extraBlocks
  #file
  #path
  #size

  // extraBlocks: allocated although they did not change (or are all zeros); XAPI
  // lists such blocks too
  constructor(path, { basePath, extraBlocks = [] } = {}) {
    super()
    this.#basePath = basePath
    this.#extraBlocks = extraBlocks
    this.#path = path
  }

  async init() {
    this.#file = await open(this.#path)
    this.#size = (await this.#file.stat()).size
    const blocks = new Set([...(await listChangedBlocks(this.#path, this.#basePath)), ...this.#extraBlocks])
    this.#blocks = [...blocks].sort((a, b) => a - b)
  }

  async close() {
    await this.#file?.close()
    this.#file = undefined
  }

  getVirtualSize() {
    return this.#size
  }

  getBlockSize() {
    return BLOCK_SIZE
  }

  getBlockIndexes() {
    return this.#blocks
  }

  hasBlock(index) {
    return this.#blocks.includes(index)
  }

  isDifferencing() {
    return this.#basePath !== undefined
  }

  async readBlock(index) {
    const data = Buffer.alloc(BLOCK_SIZE)
    await this.#file.read(data, 0, BLOCK_SIZE, index * BLOCK_SIZE)
    return { index, data }
  }
}

// The content of a disk at the time of a backup, as a raw file.
export class RawSnapshot {
  constructor(path) {
    this.path = path
  }

  async createSource({ base, extraBlocks } = {}) {
    const source = new RawSnapshotDisk(this.path, { basePath: base?.path, extraBlocks })
    await source.init()
    return source
  }

  // for expected/index.json
  async truth() {
    return { sha256: (await sha256OfFile(this.path)).sha256 }
  }

  async dispose() {
    await rm(this.path, { force: true })
  }
}
