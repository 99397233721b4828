"""Bad inputs by the thousand: what is read from outside is damaged, and each reading must end as promised."""
