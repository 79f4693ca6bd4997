"""The description of the API: an OpenAPI document, built from the declarations of the routes.

`document` puts it together. `operations` describes one route, and `webhooks` the requests that the service sends.
`errors` tells the errors that an operation can answer with, `schemas` collects the JSON schemas of the models, and
`policy` adds what the operator's settings limit. examples.json has real requests and responses, which a test records.
"""
