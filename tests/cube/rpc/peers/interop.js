// The gRPC interoperability cases with @grpc/grpc-js: node interop.js interop.proto '{"case": "host:port", ...}' [root.pem]
// Prints a line of JSON for each case: its name and what went wrong, or null. test_interop.py has the same cases in Python.

const assert = require('node:assert/strict');
const {randomUUID} = require('node:crypto');
const {readFileSync} = require('node:fs');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [, , proto, plan, root] = process.argv;
const credentials = root ? grpc.credentials.createSsl(readFileSync(root)) : grpc.credentials.createInsecure();
const {TestService, UnimplementedService, Observer} =
  grpc.loadPackageDefinition(protoLoader.loadSync(proto, {keepCase: true})).grpc.testing;

const WITHIN_MS = 20_000;
const REQUEST_SIZES = [27182, 8, 1828, 45904];
const REPLY_SIZES = [31415, 9, 2653, 58979];
const LARGE_REQUEST = {response_size: 314159, payload: {body: Buffer.alloc(271828)}};
const SLEEP = {size: 1, interval_us: 60_000_000};
const SPECIAL_MESSAGE = '\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n';
const {OK, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED} = grpc.status;

function metadataOf(values) {
  const metadata = new grpc.Metadata();
  for (const [name, value] of Object.entries(values)) metadata.set(name, value);
  return metadata;
}

// How a call ended: {code, details, replies, initial, trailing}. `start` is given a callback where the reply is no stream.
function ended(call, reply) {
  const outcome = {replies: []};
  call.on('metadata', (metadata) => (outcome.initial = metadata));
  if (!reply) call.on('data', (message) => outcome.replies.push(message)).on('error', () => {});
  return new Promise((resolve) =>
    call.on('status', ({code, details, metadata}) =>
      // the reply's callback and the last messages come before what is queued here
      setImmediate(() => resolve({...outcome, code, details, trailing: metadata, replies: reply?.messages ?? outcome.replies}))
    )
  );
}

function deadline(ms = WITHIN_MS) {
  return {deadline: Date.now() + ms};
}

function unary(client, method, request, metadata = new grpc.Metadata(), ms = WITHIN_MS) {
  const reply = {messages: []};
  return ended(client[method](request, metadata, deadline(ms), (error, message) => error || reply.messages.push(message)), reply);
}

// A call whose requests are a stream and whose reply is none: the call, and how it will have ended.
function upload(client) {
  const reply = {messages: []};
  const call = client.StreamingInputCall(new grpc.Metadata(), deadline(), (error, message) => error || reply.messages.push(message));
  return [call, ended(call, reply)];
}

function duplex(client, {method = 'FullDuplexCall', metadata = {}, ms = WITHIN_MS} = {}) {
  const call = client[method](metadataOf(metadata), deadline(ms));
  return [call, ended(call)];
}

function asking(size, requestSize) {
  return {response_parameters: [{size}], payload: {body: Buffer.alloc(requestSize)}};
}

function next(call) {
  return new Promise((resolve) => call.once('data', resolve));
}

// Answers once the server's handler of the call has been told that nobody waits for it.
async function awaitCancelled(id, address) {
  const observer = new Observer(address, credentials);
  try {
    const {code} = await unary(observer, 'Cancelled', {id}, new grpc.Metadata(), 5_000);
    assert.equal(code, OK, 'the handler was not told');
  } finally {
    observer.close();
  }
}

const sizes = (replies) => replies.map((reply) => reply.payload.body.length);

const cases = {
  async empty_unary(client) {
    const {code, replies} = await unary(client, 'EmptyCall', {});
    assert.deepEqual([code, replies.length], [OK, 1]);
  },

  async large_unary(client) {
    const {code, replies} = await unary(client, 'UnaryCall', LARGE_REQUEST);
    assert.equal(code, OK);
    assert.ok(replies[0].payload.body.equals(Buffer.alloc(314159)));
  },

  async client_streaming(client) {
    const [call, over] = upload(client);
    for (const size of REQUEST_SIZES) call.write({payload: {body: Buffer.alloc(size)}});
    call.end();
    const {code, replies} = await over;
    assert.equal(code, OK);
    assert.equal(replies[0].aggregated_payload_size, REQUEST_SIZES.reduce((a, b) => a + b));
  },

  async server_streaming(client, address, compressed = false) {
    const parameters = REPLY_SIZES.map((size) => ({size, compressed: {value: compressed}}));
    const {code, replies} = await ended(client.StreamingOutputCall({response_parameters: parameters}, deadline()));
    assert.equal(code, OK);
    assert.deepEqual(sizes(replies), REPLY_SIZES);
  },

  async ping_pong(client) {
    const [call, over] = duplex(client);
    for (const [i, size] of REPLY_SIZES.entries()) {
      const reply = next(call);
      call.write(asking(size, REQUEST_SIZES[i]));
      assert.deepEqual(sizes([await reply]), [size]);
    }
    call.end();
    const {code, replies} = await over;
    assert.deepEqual([code, replies.length], [OK, REPLY_SIZES.length]);
  },

  async half_duplex(client) {
    const [call, over] = duplex(client, {method: 'HalfDuplexCall'});
    for (const size of REPLY_SIZES) call.write(asking(size, 8));
    call.end();
    const {code, replies} = await over;
    assert.equal(code, OK);
    assert.deepEqual(sizes(replies), REPLY_SIZES);
  },

  async empty_stream(client) {
    const [call, over] = duplex(client);
    call.end();
    const {code, replies} = await over;
    assert.deepEqual([code, replies], [OK, []]);
  },

  async custom_metadata(client) {
    const sent = {
      'x-grpc-test-echo-initial': 'test_initial_metadata_value',
      'x-grpc-test-echo-trailing-bin': Buffer.from('ababab', 'hex'),
    };
    const [call, over] = duplex(client, {metadata: sent});
    call.end(asking(314159, 271828));
    for (const outcome of [await unary(client, 'UnaryCall', LARGE_REQUEST, metadataOf(sent)), await over]) {
      assert.equal(outcome.code, OK);
      assert.deepEqual(outcome.initial.get('x-grpc-test-echo-initial'), ['test_initial_metadata_value']);
      assert.deepEqual(outcome.trailing.get('x-grpc-test-echo-trailing-bin'), [Buffer.from('ababab', 'hex')]);
    }
  },

  async status_code_and_message(client) {
    const status = {code: UNKNOWN, message: 'test status message'};
    const [call, over] = duplex(client);
    call.end({response_status: status});
    for (const {code, details, replies} of [await unary(client, 'UnaryCall', {response_status: status}), await over])
      assert.deepEqual([code, details, replies], [UNKNOWN, 'test status message', []]);
  },

  async special_status_message(client) {
    const {code, details} = await unary(client, 'UnaryCall', {response_status: {code: UNKNOWN, message: SPECIAL_MESSAGE}});
    assert.deepEqual([code, details], [UNKNOWN, SPECIAL_MESSAGE]);
  },

  async unimplemented_method(client) {
    assert.equal((await unary(client, 'UnimplementedCall', {})).code, UNIMPLEMENTED);
  },

  async unimplemented_service(client, address) {
    const other = new UnimplementedService(address, credentials);
    assert.equal((await unary(other, 'UnimplementedCall', {})).code, UNIMPLEMENTED);
    other.close();
  },

  async cancel_after_begin(client) {
    const [call, over] = upload(client);
    call.cancel();
    assert.equal((await over).code, CANCELLED);
  },

  async cancel_after_first_response(client, address) {
    const id = randomUUID();
    const [call, over] = duplex(client, {metadata: {'x-call-id': id}});
    const reply = next(call);
    // grpc-js ends its requests before it resets the stream, and a handler that waits for them just ends: so let it sleep
    call.write({response_parameters: [{size: 31415}, SLEEP], payload: {body: Buffer.alloc(27182)}});
    assert.deepEqual(sizes([await reply]), [31415]);
    call.cancel();
    assert.equal((await over).code, CANCELLED);
    await awaitCancelled(id, address);
  },

  async timeout_on_sleeping_server(client, address) {
    const id = randomUUID();
    const [call, over] = duplex(client, {metadata: {'x-call-id': id}, ms: 200});
    call.write({response_parameters: [{size: 31415}, SLEEP], payload: {body: Buffer.alloc(27182)}});
    const {code, replies} = await over;
    assert.equal(code, DEADLINE_EXCEEDED);
    // on a machine that is too busy the deadline passes before the handler has begun
    if (replies.length) await awaitCancelled(id, address);
  },

  async client_compressed_unary(client) {
    const {code} = await unary(client, 'UnaryCall', {payload: {body: Buffer.alloc(271828)}});
    assert.equal(code, OK);
  },

  async client_deflated_unary(client) {
    await cases.client_compressed_unary(client);
  },

  async client_compressed_streaming(client) {
    await cases.client_streaming(client);
  },

  async server_compressed_unary(client) {
    const {code, replies} = await unary(client, 'UnaryCall', {response_compressed: {value: true}, response_size: 314159});
    assert.equal(code, OK);
    assert.ok(replies[0].payload.body.equals(Buffer.alloc(314159)));
  },

  async server_compressed_streaming(client, address) {
    await cases.server_streaming(client, address, true);
  },
};

const GZIP = {'grpc.default_compression_algorithm': 2};
const options = {
  client_compressed_unary: GZIP,
  client_compressed_streaming: GZIP,
  client_deflated_unary: {'grpc.default_compression_algorithm': 1},
};

async function main() {
  for (const [name, address] of Object.entries(JSON.parse(plan))) {
    const client = new TestService(address, credentials, options[name]);
    const error = await cases[name](client, address).then(() => null, (problem) => String(problem.stack));
    client.close();
    console.log(JSON.stringify({case: name, error}));
  }
}

main();
