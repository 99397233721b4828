"""Where ranks meet."""

from actors.network import interface_of


def test_the_interface_of_an_address_is_found_and_that_of_another_machines_is_not():
    name = interface_of("127.0.0.1")
    assert name is not None
    assert name.startswith("lo")
    assert interface_of("::1") in (name, None)  # where the machine has IPv6
    assert interface_of("203.0.113.1") is None  # of RFC 5737: nobody's
