"""A client that knows a server by what the server says of itself, as grpcurl does.

It has no generated code of the project: descriptors come over the reflection service, messages go in and come out as
JSON. `google.rpc.Status` is what every gRPC client has; the types of the details in it are asked of the server too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_reflection.v1alpha import reflection_pb2 as pb

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Failed(Exception):
    """An RPC that ended with an error: its status name, its text, and its details as JSON by type."""

    code: str
    message: str
    details: dict[str, Any]


@dataclass
class ReflectionClient:
    """`reflection` is the service to ask: v1 and v1alpha have the same messages."""

    channel: grpc.Channel
    reflection: str = "grpc.reflection.v1.ServerReflection"
    pool: descriptor_pool.DescriptorPool = field(default_factory=descriptor_pool.DescriptorPool)
    known: set[str] = field(default_factory=set)

    def services(self) -> set[str]:
        answer = self._ask(pb.ServerReflectionRequest(list_services=""))
        return {service.name for service in answer.list_services_response.service}

    def call(self, method: str, body: dict[str, Any] | None = None) -> Any:
        """One answer, as JSON; `method` is `package.Service/Method`."""
        try:
            return _json(self._invoke(method, body or {}))
        except grpc.RpcError as error:
            raise self._failed(error) from None

    def stream(self, method: str, body: dict[str, Any]) -> Iterator[Any]:
        """All answers, until the server ends the call with OK."""
        try:
            for answer in self._invoke(method, body):
                yield _json(answer)
        except grpc.RpcError as error:
            raise self._failed(error) from None

    def _invoke(self, method: str, body: dict[str, Any]) -> Any:
        service, _, name = method.partition("/")
        self._learn(pb.ServerReflectionRequest(file_containing_symbol=service))
        found = self.pool.FindServiceByName(service).methods_by_name[name]
        asked = message_factory.GetMessageClass(found.input_type)
        answered = message_factory.GetMessageClass(found.output_type)
        make = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        stub = make(f"/{method}", request_serializer=asked.SerializeToString, response_deserializer=answered.FromString)
        return stub(json_format.ParseDict(body, asked(), descriptor_pool=self.pool), timeout=TIMEOUT_S)

    def _failed(self, error: grpc.RpcError) -> Failed:
        status = status_pb2.Status()
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                status.ParseFromString(value)
        details = {}
        for detail in status.details:
            name = detail.TypeName()
            self._learn(pb.ServerReflectionRequest(file_containing_symbol=name))
            message = message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))()
            assert detail.Unpack(message)
            details[name] = _json(message)
        return Failed(error.code().name, error.details(), details)

    def _learn(self, request: pb.ServerReflectionRequest) -> None:
        """Adds a file and all that it needs to the pool, what is needed first."""
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(text)
            for text in self._ask(request).file_descriptor_response.file_descriptor_proto
        ]
        for file in files:
            if file.name in self.known:
                continue
            self.known.add(file.name)
            for needed in file.dependency:
                if needed not in self.known:
                    self._learn(pb.ServerReflectionRequest(file_by_filename=needed))
            self.pool.Add(file)

    def _ask(self, request: pb.ServerReflectionRequest) -> pb.ServerReflectionResponse:
        ask = self.channel.stream_stream(
            f"/{self.reflection}/ServerReflectionInfo",
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )
        (answer,) = ask(iter([request]), timeout=TIMEOUT_S)
        assert not answer.HasField("error_response"), answer.error_response.error_message
        return answer


def _json(message: Message) -> Any:
    return json_format.MessageToDict(message)
