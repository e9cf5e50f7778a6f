"""Certificates for servers that are to be checked."""

import subprocess


def make_certificate(folder, name):
    """Make a certificate for the host ``name``, which is its own authority; return its path and that of its key."""
    certificate, key = folder / "server.crt", folder / "server.key"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    host = ["-subj", "/CN=%s" % name, "-addext", "subjectAltName=DNS:%s" % name]
    command = ["openssl", "req", "-x509", *kind, *host, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
