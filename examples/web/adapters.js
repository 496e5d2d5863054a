// Reads onnxruntime's adapter files. onnxruntime-web has no call for them, but takes their tensors as inputs.

import { ByteBuffer } from "flatbuffers";

// The format's tables: Adapter {format_version, adapter_version, model_version, parameters: [Parameter]};
// Parameter {name, dims: [int64], data_type, raw_data: [uint8]}. A field's place is 4 + 2 times its number.
const MODEL_VERSION = 8;
const PARAMETERS = 10;
const [NAME, DIMS, DATA_TYPE, RAW_DATA] = [4, 6, 8, 10];
const TYPES = { 1: ["float32", Float32Array], 6: ["int32", Int32Array], 7: ["int64", BigInt64Array] };

/** The tensors of a file by name, as {type, data, dims}; and the number of the base and slots that it is for. */
export function readAdapter(bytes) {
  const buffer = new ByteBuffer(bytes);
  if (bytes.length < 8 || !buffer.__has_identifier("TORT")) throw new Error("this is no adapter");
  const root = buffer.readInt32(0);
  const tensors = {};
  for (const table of entries(buffer, root, PARAMETERS)) {
    const kind = buffer.readInt32(field(buffer, table, DATA_TYPE));
    if (!(kind in TYPES)) throw new Error(`tensors of type ${kind} are not read here`);
    const [type, Numbers] = TYPES[kind];
    const [at, length] = vector(buffer, table, RAW_DATA);
    const [first, axes] = vector(buffer, table, DIMS);
    const dims = Array.from({ length: axes }, (_, axis) => Number(buffer.readInt64(first + 8 * axis)));
    const name = buffer.__string(field(buffer, table, NAME));
    tensors[name] = { type, data: new Numbers(bytes.slice(at, at + length).buffer), dims };
  }
  return { tensors, base: buffer.readInt32(field(buffer, root, MODEL_VERSION)) };
}

function field(buffer, table, place) {
  const offset = buffer.__offset(table, place);
  if (!offset) throw new Error("this adapter is damaged");
  return table + offset;
}

function vector(buffer, table, place) {
  const offset = buffer.__offset(table, place);
  return offset ? [buffer.__vector(table + offset), buffer.__vector_len(table + offset)] : [0, 0];
}

function entries(buffer, table, place) {
  const [first, count] = vector(buffer, table, place);
  return Array.from({ length: count }, (_, i) => buffer.__indirect(first + 4 * i));
}
