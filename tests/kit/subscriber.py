"""Records the messages that a broker delivers: subscriber.py -t FILTER [--session ID] OUTFILE, and the flags of mosquitto_sub
-h HOST -p PORT --cafile --cert --key -u -P.

It shares no code with the product or with mosquitto's clients. Every message is one line of JSON, which is written
before the message is acknowledged. `ready` is printed whenever a subscription is granted: once, and after every
reconnection. With --session the broker stores messages while the subscriber is disconnected.
"""

import argparse
import base64
import json
import time

import paho.mqtt.client as mqtt


def listen(arguments, on_message, on_ready=lambda: None, prepare=lambda client: None):
    """Subscribes, and handles messages until the process is killed."""
    client = mqtt.Client(
        mqtt.CallbackAPIVersion.VERSION2,
        client_id=arguments.session or "",
        clean_session=arguments.session is None,
        protocol=mqtt.MQTTv311,
    )

    def ready():
        on_ready()
        print("ready", flush=True)

    def on_connect(client, _data, flags, reason, _properties):
        if reason.is_failure:
            return
        if flags.session_present:
            ready()
        else:
            client.subscribe(arguments.filter, qos=1)

    def on_subscribe(_client, _data, _identifier, reasons, _properties):
        if not any(reason.is_failure for reason in reasons):
            ready()

    client.on_connect, client.on_subscribe = on_connect, on_subscribe
    client.on_message = lambda _client, _data, message: on_message(message)
    if arguments.cafile:
        client.tls_set(arguments.cafile, arguments.cert, arguments.key)
    if arguments.user:
        client.username_pw_set(arguments.user, arguments.password)
    client.reconnect_delay_set(min_delay=0.1, max_delay=1)
    prepare(client)
    client.connect_async(arguments.host, arguments.port, keepalive=10)
    client.loop_forever(retry_first_connection=True)


def parsed(payload):
    """JSON, or an object with base64 for other bytes. NaN, which Python would accept, is not valid JSON."""

    def reject(name):
        raise ValueError(name)

    try:
        return json.loads(payload, parse_constant=reject)
    except ValueError:
        return {"base64": base64.b64encode(payload).decode()}


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-h", dest="host", default="127.0.0.1")
    parser.add_argument("-p", dest="port", type=int, required=True)
    parser.add_argument("-t", dest="filter", required=True)
    parser.add_argument("-u", dest="user")
    parser.add_argument("-P", dest="password")
    for flag in ("--cafile", "--cert", "--key", "--session"):
        parser.add_argument(flag)
    parser.add_argument("file")
    arguments = parser.parse_args()
    with open(arguments.file, "a", encoding="utf-8") as file:

        def write(message):
            line = {
                "topic": message.topic,
                "qos": message.qos,
                "retain": message.retain,
                "dup": message.dup,
                "received_at": time.time(),
                "payload": parsed(message.payload),
            }
            file.write(json.dumps(line) + "\n")
            file.flush()

        listen(arguments, write)


if __name__ == "__main__":
    main()
