"""What may come with a notification, and what Odoo reads it with."""

import json

import orjson

#: what the dispatchers of all series read a payload with; from 19.0 on it is orjson, if that is installed
READERS = [json.loads, orjson.loads]

# PostgreSQL takes no more of a payload, in bytes.
LONGEST = 7999

#: what each series makes of it; below 19.0 that is json
HOSTILE = {
    "nothing": "",
    "no JSON": "garbage",
    "a BOM": "\ufeff[]",
    "a number": "1",
    "null": "null",
    "an object": '{"tests": 1}',
    "a list of numbers": "[1, 2]",
    "an object as channel": '[{"tests": 1}]',
    "an empty channel": "[[]]",
    "an empty name": '[""]',
    "an unhashable channel": '[["tests", ["tests"]]]',
    "a list last in a channel": '[["bus_alt", "tests", ["x"]]]',
    "an empty list in a channel": '[["bus_alt", []]]',
    "lists first and second in a channel": '[[["bus_alt"], ["x"]]]',
    "a list in one of two channels": '[["bus_alt", "tests"], ["bus_alt", ["x"]]]',
    "an object in a channel": '[["tests", {}]]',
    "NaN in a channel": '[["tests", NaN, Infinity]]',
    "a huge number": "[[%s]]" % ("9" * 7000),
    "a large number": "[[%d]]" % 2**70,
    "NUL, escaped": '["\\u0000"]',
    "a lone surrogate": '["\\ud800"]',
    "deep nesting": "[" * 3000,
    "deep nesting, closed": "[" * 3000 + "]" * 3000,
    "as long as can be": "x" * LONGEST,
    "a long list": "[%s1]" % ("1," * 3900),
    "control characters": "\x01\x1b[31m\r\nfaked line\x7f",
    "cut off": '[["tests", "a',
    "two values": "[] []",
}
