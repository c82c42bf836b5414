#!/bin/sh
# Stageline from a shell, without any .proto file: the server has reflection. `pip install buf-bin` brings buf.
#   examples/buf_curl.sh [HOST:PORT]       STAGELINE_API_KEY=... where the server has keys
# grpcurl's spelling (not run): grpcurl -plaintext -d '{...}' HOST:PORT stageline.inference.v1.InferenceService/StreamGenerate
set -eu
service=http://${1:-127.0.0.1:9000}/stageline.inference.v1.InferenceService

call() { # METHOD JSON; the key goes over stdin, since everybody on a host can read the arguments of its processes
    {
        [ -z "${STAGELINE_API_KEY:-}" ] || printf 'authorization: Bearer %s\n' "$STAGELINE_API_KEY"
        printf '\n%s\n' "$2"
    } | buf curl --http2-prior-knowledge --protocol grpc --header @- --reflect-header '*' --data @- "$service/$1"
}

call GetModel '{}'
call Tokenize '{"text": "Why is the sky blue?"}'
call StreamGenerate '{"generation": {"text": "Why is the sky blue?", "stop": {"max_tokens": 8}}}'
