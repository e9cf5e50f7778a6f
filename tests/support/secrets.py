"""Passwords that are easy to find wherever they turn up."""

import re

#: that of stack.postgres
SERVER_PASSWORD = "odoo-s3cret"
# Of words, so that a part of one is found as well, and of characters that mean something to somebody on the way.
POOLER_PASSWORD = "kilo'lima %mike= november;@oscar/:papa"
LISTENER_PASSWORD = "quebec'romeo \"sierra\\tango= uniform@victor/:whiskey"
WRONG_PASSWORD = "xray'yankee \"zulu\\alfa bravo=@charlie"
ENCODED_PASSWORD = "delta%27echo%20foxtrot%40golf%2Fhotel"

SECRETS = [SERVER_PASSWORD, POOLER_PASSWORD, LISTENER_PASSWORD, WRONG_PASSWORD, ENCODED_PASSWORD]


def words(secret):
    return [word for word in re.split(r"[^a-z]+", re.sub("%..", " ", secret)) if len(word) > 3]


SECRET_WORDS = [SERVER_PASSWORD] + [word for secret in SECRETS[1:] for word in words(secret)]


def leaks(text):
    return [word for word in SECRET_WORDS if word in text]
