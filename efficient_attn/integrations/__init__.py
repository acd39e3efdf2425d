"""This package inside other libraries. Importing this imports none of them."""
