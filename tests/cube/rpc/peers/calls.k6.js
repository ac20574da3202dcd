// Unary and streaming calls by k6, each answer checked: k6 run -e ADDRESS=host:port calls.k6.js

import {check} from 'k6';
import {Counter} from 'k6/metrics';
import {Client, StatusOK, StatusUnknown, Stream} from 'k6/net/grpc';

const SERVICE = 'grpc.testing.TestService';
const SIZES = [31415, 9, 2653, 58979];

const answers = new Counter('answers');
const client = new Client();
client.load([], 'interop.proto');

export const options = {
  scenarios: {
    unary: {executor: 'shared-iterations', exec: 'unary', vus: 4, iterations: 40, maxDuration: '150s'},
    streaming: {executor: 'shared-iterations', exec: 'streaming', vus: 2, iterations: 10, maxDuration: '150s'},
  },
  thresholds: {
    checks: ['rate == 1'], // every check that was made held
    answers: ['count == 90'], // and they were made: two for a unary iteration, one for a streaming one
  },
};

// how many bytes base64 stands for, of zeros that make no padding worth a look
const size = (base64) => (base64 || '').replace(/=+$/, '').length * 0.75 | 0;

export function unary() {
  client.connect(__ENV.ADDRESS, {plaintext: true});
  const metadata = {'x-grpc-test-echo-initial': `${__VU}-${__ITER}`};
  const good = client.invoke(`${SERVICE}/UnaryCall`, {response_size: 1700}, {metadata, timeout: '100s'});
  answers.add(1);
  check(good, {
    'status is OK': (reply) => reply.status === StatusOK,
    'reply is whole': (reply) => size(reply.message.payload.body) === 1700,
    'metadata is echoed': (reply) => reply.headers['x-grpc-test-echo-initial'][0] === `${__VU}-${__ITER}`,
  });
  const bad = client.invoke(`${SERVICE}/UnaryCall`, {response_status: {code: 2, message: 'as asked'}});
  answers.add(1);
  check(bad, {
    'status is that asked for': (reply) => reply.status === StatusUnknown && reply.error.message === 'as asked',
  });
  client.close();
}

export function streaming() {
  client.connect(__ENV.ADDRESS, {plaintext: true});
  const stream = new Stream(client, `${SERVICE}/FullDuplexCall`, {timeout: '100s'});
  const received = [];
  stream.on('data', (reply) => received.push(size(reply.payload.body)));
  stream.on('error', (error) => check(error, {'stream has no error': () => false}));
  stream.on('end', () => {
    answers.add(1);
    check(received, {'replies are whole and in order': () => received.join() === SIZES.join()});
    client.close();
  });
  for (const wanted of SIZES) stream.write({response_parameters: [{size: wanted}]});
  stream.end();
}
