"""Captures Sparkplug B traffic and checks it against the Sparkplug 3.0 specification, without code of the product.

    sparkplug.py capture HOST PORT OUTFILE     writes every message under spBv1.0/ as a line of JSON; prints `ready`
    sparkplug.py check OUTFILE                 prints a report as JSON; the exit status is 1 if there are violations

A line is {"topic", "qos", "retain", "payload"}. A payload is {"timestamp", "seq", "metrics"}, and a metric {"name",
"alias", "timestamp", "datatype", "is_historical", "is_null", "field", "value"}, where `field` is the protobuf field
that holds the value; absent fields are omitted. STATE messages are stored as the JSON that they are. Bytes that
cannot be decoded give {"error": ...}. After the capture lost its connection for a while there is a line
{"reconnected": true}; messages that it missed are not counted as violations.
"""

import argparse
import base64
import json
import sys

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

import subscriber

INT64, BOOLEAN = 4, 11
BIRTHS, DEATHS, DATA = ("NBIRTH", "DBIRTH"), ("NDEATH", "DDEATH"), ("NDATA", "DDATA")
COMMANDS = ("NCMD", "DCMD")
REBIRTH = "Node Control/Rebirth"
# The field that holds a value, by the number of its data type (section 6.4.16); other types are not checked.
FIELD = {
    **dict.fromkeys((1, 2, 3, 5, 6, 7), "int_value"),
    **dict.fromkeys((4, 8, 13), "long_value"),
    9: "float_value",
    10: "double_value",
    11: "boolean_value",
    **dict.fromkeys((12, 14, 15), "string_value"),
    **dict.fromkeys((17, 18), "bytes_value"),
}
SIGNED_BITS = {1: 32, 2: 32, 3: 32, 4: 64}


def payload_class():
    """The payload message of section 6.4 of the specification, as far as it is checked; deeper levels are kept as bytes."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="lineside_check.proto", package="check", syntax="proto2")

    def message(name, fields):
        made = file.message_type.add(name=name)
        for number, (field, kind) in fields.items():
            is_message = kind == kinds.TYPE_MESSAGE
            made.field.add(
                name=field,
                number=number,
                type=kind,
                label=kinds.LABEL_REPEATED if is_message else kinds.LABEL_OPTIONAL,
                type_name=".check.Metric" if is_message else None,
            )

    message(
        "Metric",
        {
            1: ("name", kinds.TYPE_STRING),
            2: ("alias", kinds.TYPE_UINT64),
            3: ("timestamp", kinds.TYPE_UINT64),
            4: ("datatype", kinds.TYPE_UINT32),
            5: ("is_historical", kinds.TYPE_BOOL),
            6: ("is_transient", kinds.TYPE_BOOL),
            7: ("is_null", kinds.TYPE_BOOL),
            8: ("metadata", kinds.TYPE_BYTES),
            9: ("properties", kinds.TYPE_BYTES),
            10: ("int_value", kinds.TYPE_UINT32),
            11: ("long_value", kinds.TYPE_UINT64),
            12: ("float_value", kinds.TYPE_FLOAT),
            13: ("double_value", kinds.TYPE_DOUBLE),
            14: ("boolean_value", kinds.TYPE_BOOL),
            15: ("string_value", kinds.TYPE_STRING),
            16: ("bytes_value", kinds.TYPE_BYTES),
            17: ("dataset_value", kinds.TYPE_BYTES),
            18: ("template_value", kinds.TYPE_BYTES),
            19: ("extension_value", kinds.TYPE_BYTES),
        },
    )
    message(
        "Payload",
        {
            1: ("timestamp", kinds.TYPE_UINT64),
            2: ("metrics", kinds.TYPE_MESSAGE),
            3: ("seq", kinds.TYPE_UINT64),
            4: ("uuid", kinds.TYPE_STRING),
            5: ("body", kinds.TYPE_BYTES),
        },
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("check.Payload"))


Payload = payload_class()


def decoded(topic, data):
    try:
        if topic.startswith("spBv1.0/STATE/"):
            return json.loads(data)
        payload = Payload.FromString(data)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    fields = {field.name: value for field, value in payload.ListFields() if field.name in ("timestamp", "seq")}
    return {**fields, "metrics": [decoded_metric(metric) for metric in payload.metrics]}


def decoded_metric(metric):
    fields = {}
    for field, value in metric.ListFields():
        if not field.name.endswith("_value"):
            fields[field.name] = base64.b64encode(value).decode() if isinstance(value, bytes) else value
            continue
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode()
        elif isinstance(value, float) and value - value != 0:
            value = str(value)  # JSON has no representation of NaN and infinity.
        bits = SIGNED_BITS.get(metric.datatype)
        if bits and isinstance(value, int) and value >> (bits - 1):
            value -= 1 << bits
        fields |= {"field": field.name, "value": value}
    return fields


def capture(host, port, path):
    with open(path, "a", encoding="utf-8") as file:
        ready_before = False

        def write(line):
            file.write(json.dumps(line) + "\n")
            file.flush()

        def on_ready():
            nonlocal ready_before
            if ready_before:
                write({"reconnected": True})
            ready_before = True

        def on_message(message):
            payload = decoded(message.topic, message.payload)
            write({"topic": message.topic, "qos": message.qos, "retain": message.retain, "payload": payload})

        arguments = argparse.Namespace(host=host, port=port, filter="spBv1.0/#", session=None, cafile=None, user=None)
        # Mosquitto forwards the retain flag of a message only to bridges.
        subscriber.listen(arguments, on_message, on_ready, lambda client: client.enable_bridge_mode())


class Node:
    """The state of an edge node according to its messages; `is_alive` is None after a gap in the capture."""

    def __init__(self):
        self.is_alive = False
        self.bd_seq = None
        self.seq = None
        self.rebirths_requested = 0
        self.births = {}  # By device, "" for the node itself: {name: metric}.


class Checker:
    def __init__(self):
        self.nodes = {}
        self.counts = dict.fromkeys(("messages", "births", "deaths", "data", "historical"), 0)
        self.violations = []

    def report(self):
        return {**self.counts, "violations": self.violations}

    def check_line(self, line):
        if line.get("reconnected"):
            for node in self.nodes.values():
                node.is_alive = None
            return
        self.counts["messages"] += 1
        self.topic = line["topic"]
        parts = self.topic.split("/")
        if parts[:2] == ["spBv1.0", "STATE"] and len(parts) == 3:
            return
        self.expect(not line["retain"], "is retained")
        kind = parts[2] if len(parts) > 2 else ""
        is_known = kind in BIRTHS + DEATHS + DATA + COMMANDS
        length = 4 if kind.startswith("N") else 5
        is_known = is_known and parts[0] == "spBv1.0" and len(parts) == length and all(parts)
        if not self.expect(is_known, "does not have a Sparkplug topic"):
            return
        payload = line["payload"]
        if not self.expect("error" not in payload, f"cannot be decoded: {payload.get('error')}"):
            return
        node = self.nodes.setdefault((parts[1], parts[3]), Node())
        device = parts[4] if length == 5 else ""
        if kind in COMMANDS:
            is_rebirth = any(metric.get("name") == REBIRTH and metric.get("value") for metric in payload["metrics"])
            node.rebirths_requested += kind == "NCMD" and is_rebirth
            return
        for count, kinds in (("births", BIRTHS), ("deaths", DEATHS), ("data", DATA)):
            self.counts[count] += kind in kinds
        is_historical = any(metric.get("is_historical") for metric in payload["metrics"])
        self.counts["historical"] += kind in DATA and is_historical
        if kind != "NDEATH":
            self.expect(line["qos"] == 0, f"has QoS {line['qos']}")
            self.expect("timestamp" in payload, "has no timestamp")
        getattr(self, kind.lower())(node, device, payload)

    def expect(self, condition, text):
        if not condition:
            self.violations.append(f"message {self.counts['messages']} {self.topic} {text}")
        return condition

    def nbirth(self, node, _device, payload):
        self.expect(payload.get("seq") == 0, f"has seq {payload.get('seq')} instead of 0")
        metrics = {metric.get("name"): metric for metric in payload["metrics"]}
        bd_seq = self.birth_of_session(metrics.get("bdSeq"))
        rebirth = metrics.get(REBIRTH, {})
        is_valid = rebirth.get("datatype") == BOOLEAN and rebirth.get("value") is False
        self.expect(is_valid, f"has no metric {REBIRTH} that is a Boolean and false")
        # A requested rebirth repeats the bdSeq of the session; any other birth begins a new session.
        is_again = node.is_alive is None or (node.is_alive and node.rebirths_requested > 0)
        if bd_seq == node.bd_seq:
            self.expect(is_again or bd_seq is None, f"repeats bdSeq {bd_seq}")
            node.rebirths_requested = max(0, node.rebirths_requested - 1)
        else:
            self.expect(not node.is_alive, "begins a session before the death of the previous one")
            node.rebirths_requested = 0
        node.is_alive, node.bd_seq, node.seq = True, bd_seq, 0
        node.births = {}
        self.born(node, "", payload)

    def ndeath(self, node, _device, payload):
        self.expect("seq" not in payload, "has a seq")
        metrics = payload["metrics"]
        self.expect([metric.get("name") for metric in metrics] == ["bdSeq"], "has other metrics than bdSeq")
        bd_seq = self.birth_of_session(next(iter(metrics), None))
        # A death of a node that is not alive belongs to a connection that ended before its birth, or is a repetition.
        if not node.is_alive or self.expect(bd_seq == node.bd_seq, f"has bdSeq {bd_seq}, the birth had {node.bd_seq}"):
            node.is_alive, node.births = False, {}

    def birth_of_session(self, metric):
        metric = metric or {}
        value = metric.get("value")
        is_valid = metric.get("datatype") == INT64 and metric.get("field") == FIELD[INT64] and 0 <= value <= 255
        self.expect(is_valid, "has no metric bdSeq that is an INT64 from 0 to 255")
        return value

    def dbirth(self, node, device, payload):
        if self.follows(node, payload):
            self.born(node, device, payload)

    def born(self, node, device, payload):
        node.births[device] = {}
        taken = {metric.get("alias") for birth in node.births.values() for metric in birth.values()}
        for metric in payload["metrics"]:
            name, alias = metric.get("name"), metric.get("alias")
            if not self.expect(name and "datatype" in metric, f"contains a metric without a name or a datatype: {metric}"):
                continue
            self.expect(name not in node.births[device], f"contains {name} twice")
            self.expect(alias is None or alias not in taken, f"assigns {name} the alias {alias} of another metric")
            self.check_value(name, metric, metric["datatype"])
            node.births[device][name] = metric
            taken.add(alias)

    def ndata(self, node, device, payload):
        if self.follows(node, payload) and self.expect(device in node.births, "has no birth before it"):
            by_alias = {metric.get("alias"): metric for metric in node.births[device].values()}
            for metric in payload["metrics"]:
                self.check_data(metric, node.births[device], by_alias)

    ddata = ndata

    def check_data(self, metric, by_name, by_alias):
        name, alias = metric.get("name"), metric.get("alias")
        born = by_name.get(name) if alias is None else by_alias.get(alias)
        if not self.expect(born, f"has a metric that no birth announced: {metric}"):
            return
        name = born["name"]
        self.expect("alias" not in born or "name" not in metric, f"uses the name {name} although the birth assigned an alias")
        datatype = metric.get("datatype", born["datatype"])
        self.expect(datatype == born["datatype"], f"has another datatype for {name} than the birth")
        self.check_value(name, metric, born["datatype"])

    def check_value(self, name, metric, datatype):
        self.expect("timestamp" in metric, f"has {name} without a timestamp")
        field = metric.get("field")
        is_valid = metric.get("is_null") if field is None else field == FIELD.get(datatype, field)
        self.expect(is_valid, f"has {name} of datatype {datatype} with {field or 'no value'}")

    def ddeath(self, node, device, payload):
        if self.follows(node, payload):
            self.expect(node.births.pop(device, None), "ends a device without a birth")

    def follows(self, node, payload):
        """Whether the message belongs to a session; its seq must be the next one."""
        if node.is_alive is None or not self.expect(node.is_alive, "has no NBIRTH before it"):
            return False
        due, node.seq = (node.seq + 1) % 256, payload.get("seq")
        self.expect(node.seq == due, f"has seq {node.seq} instead of {due}")
        node.seq = due if node.seq is None else node.seq
        return True


def check(path):
    checker = Checker()
    with open(path, encoding="utf-8") as file:
        for line in file:
            checker.check_line(json.loads(line))
    print(json.dumps(checker.report()))
    sys.exit(bool(checker.violations))


if __name__ == "__main__":
    if sys.argv[1] == "capture":
        capture(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        check(sys.argv[2])
