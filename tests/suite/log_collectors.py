#!/usr/bin/env python3
"""Reads a log file in the format of CRI with the rules of edge-manifests/logging, and prints what each collector makes of it.

Fluent Bit and Fluentd are not installed here. This program takes the patterns, time formats and keys from their configurations
and applies them as their documentation says, so that a pattern or format that does not fit the logs is found.

Usage: log_collectors.py FILE FOLDER. Prints JSON: {"fluentd": [records], "fluent-bit": [records]}.
"""

import datetime
import json
import pathlib
import re
import sys

# The parser `cri` of Fluent Bit, which is built in.
FLUENT_BIT_CRI = r"^(?<time>.+?) (?<stream>stdout|stderr) (?<logtag>F|P) (?<log>.*)$"
CRI_TIME = "%Y-%m-%dT%H:%M:%S.%L%z"


def parse_time(text: str, form: str) -> datetime.datetime:
    """Parses a time; %N (Ruby) and %L (Fluent Bit) are fractions of 1 to 9 digits, and %z may be Z."""
    date, fraction = re.fullmatch(r"(.*?)(?:\.(\d{1,9}))?(?:Z|[+-]\d\d:?\d\d)", text).groups()
    expected = re.sub(r"\.%[NL]", "", form)
    assert ("%N" in form or "%L" in form) == (fraction is not None), f"{text} does not fit {form}"
    return datetime.datetime.strptime(date + "+0000", expected)


def single(pattern: str, text: str) -> str:
    """The only match of a pattern."""
    found = re.findall(pattern, text, re.MULTILINE)
    assert len(found) == 1, f"{pattern} occurs {len(found)} times"
    return found[0]


def joined(lines: list, pattern: str, form: str) -> list:
    """The contents of the entries: the parts with the tag P are joined with the next one of the same stream with the tag F."""
    compiled, parts, entries = re.compile(pattern.replace("(?<", "(?P<")), {}, []
    for line in lines:
        match = compiled.match(line)
        assert match, f"{pattern} does not match {line[:120]}"
        parse_time(match["time"], form)
        text = parts.pop(match["stream"], "") + match["log"]
        if match["logtag"] == "P":
            parts[match["stream"]] = text
        else:
            entries.append(text)
    assert not parts, "a part has no end"
    return entries


def records(entries: list, key: str, form: str) -> list:
    """The fields of each entry; an entry that is not JSON keeps the field `log`."""
    parsed = []
    for entry in entries:
        try:
            record = json.loads(entry)
        except json.JSONDecodeError:
            parsed.append({"log": entry})
            continue
        parse_time(record[key], form)
        parsed.append(record)
    return parsed


def main() -> None:
    lines = pathlib.Path(sys.argv[1]).read_text().splitlines()
    folder = pathlib.Path(sys.argv[2])
    fluentd = (folder / "fluentd.conf").read_text()
    formats = re.findall(r"time_format (\S+)", fluentd)
    for setting in ["use_partial_cri_logtag true", "partial_cri_logtag_key logtag", "partial_cri_stream_key stream", 'separator ""']:
        assert setting in fluentd, setting
    by_fluentd = joined(lines, single(r"expression /(.*)/$", fluentd), formats[0])
    bit = (folder / "fluent-bit.yaml").read_text()
    assert single(r"multiline\.parser: (\S+)", bit) == "cri"
    by_bit = joined(lines, FLUENT_BIT_CRI, CRI_TIME)
    json.dump(
        {
            "fluentd": records(by_fluentd, single(r"time_key (timestamp)$", fluentd), formats[1]),
            "fluent-bit": records(by_bit, single(r"time_key: (\S+)$", bit), single(r'time_format: "(.*)"$', bit)),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
