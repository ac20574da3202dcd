"""Certificates of a throw-away authority."""

import ssl

import trustme


class Authority:
    """Signs for servers and for clients; its files lie in `directory`."""

    def __init__(self, directory):
        self._ca = trustme.CA()
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.roots = directory / "roots.pem"
        self._ca.cert_pem.write_to_path(str(self.roots))

    def issue(self, name, *hosts, not_before=None, not_after=None):
        """Write NAME.pem and NAME.key for these hosts (or over what is there); returns their paths."""
        hosts = hosts or ("localhost", "127.0.0.1")
        issued = self._ca.issue_cert(*hosts, not_before=not_before, not_after=not_after)
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        return certificate, key

    def client(self, certificate=None, key=None, alpn=()):
        """A client's context that trusts this authority, and has a certificate itself if one is given."""
        context = ssl.create_default_context(cafile=self.roots)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context
