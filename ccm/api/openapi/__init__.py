"""The description of the API: an OpenAPI document, built from the declarations of the routes.

`document` puts it together. `operations` describes one route, `errors` tells the errors that it can answer with,
`schemas` collects the JSON schemas of the models, and `policy` adds what the operator's settings limit. examples.json
has real requests and responses, which a test records.
"""
