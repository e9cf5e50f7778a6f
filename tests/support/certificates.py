"""Certificates for servers that are to be checked."""

import subprocess


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_authority(folder, name):
    """Make a certificate of an authority; return its path and that of its key."""
    certificate, key = folder / (name + ".crt"), folder / (name + ".key")
    subject = ["-subj", "/CN=%s" % name, "-addext", "keyUsage=critical,keyCertSign"]
    openssl("req", "-x509", *_KEY, "-keyout", key, "-out", certificate, "-days", 2, *subject)
    return certificate, key


def make_certificate(folder, authority, name):
    """Make a server's certificate, for the host ``name``; return its path and that of its key."""
    certificate, key, request = (folder / ("server." + ending) for ending in ("crt", "key", "csr"))
    extensions = folder / "extensions"
    extensions.write_text("subjectAltName=DNS:%s\n" % name)
    openssl("req", *_KEY, "-keyout", key, "-out", request, "-subj", "/CN=%s" % name)
    signed_by = ["-CA", authority[0], "-CAkey", authority[1], "-CAcreateserial"]
    openssl("x509", "-req", *signed_by, "-in", request, "-out", certificate, "-days", 2, "-extfile", extensions)
    return certificate, key


_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
