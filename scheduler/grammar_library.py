"""Grammars that a request can ask for by name, as Lark texts. Our own: smaller than the languages they are named after,
so that whatever follows them is a text of the language. `json` is not here: that is a schema that allows everything.
"""

SQL = r"""
start: query ";"?
query: select (WS SET WS select)*
select: "SELECT" WS ("DISTINCT" WS)? columns WS "FROM" WS table (WS join)* clauses
clauses: (WS where)? (WS group)? (WS order)? (WS limit)?
columns: "*" | column (COMMA column)*
column: value (WS "AS" WS NAME)?
table: (path | "(" query ")") (WS "AS" WS NAME)?
join: (KIND WS)? "JOIN" WS table WS "ON" WS condition
where: "WHERE" WS condition
group: "GROUP BY" WS value (COMMA value)* (WS "HAVING" WS condition)?
order: "ORDER BY" WS sorted (COMMA sorted)*
sorted: value (WS DIRECTION)?
limit: "LIMIT" WS INTEGER (WS "OFFSET" WS INTEGER)?
condition: test (WS LOGIC WS test)*
test: ("NOT" WS)? (comparison | "(" condition ")")
comparison: value WS? COMPARED WS? value
    | value WS "IS" WS ("NOT" WS)? "NULL"
    | value WS ("NOT" WS)? "LIKE" WS STRING
    | value WS ("NOT" WS)? "BETWEEN" WS value WS "AND" WS value
    | value WS ("NOT" WS)? "IN" WS? "(" (query | value (COMMA value)*) ")"
value: term (WS? OPERATOR WS? term)*
term: path | NUMBER | STRING | "NULL" | call | "(" value ")"
call: FUNCTION "(" ("*" | ("DISTINCT" WS)? value (COMMA value)*) ")"
path: NAME ("." NAME)*
SET: "UNION" | "UNION ALL" | "INTERSECT" | "EXCEPT"
KIND: "INNER" | "LEFT" | "RIGHT" | "FULL" | "CROSS"
DIRECTION: "ASC" | "DESC"
LOGIC: "AND" | "OR"
COMPARED: "=" | "<>" | "!=" | "<" | "<=" | ">" | ">="
OPERATOR: "+" | "-" | "*" | "/" | "||"
FUNCTION: "COUNT" | "SUM" | "AVG" | "MIN" | "MAX" | "LOWER" | "UPPER" | "LENGTH" | "ABS" | "ROUND" | "COALESCE"
NAME: /[a-z_][a-z0-9_]{0,40}/
STRING: /'([^'\n]|''){0,200}'/
NUMBER: /-?[0-9]{1,15}(\.[0-9]{1,15})?/
INTEGER: /[0-9]{1,9}/
COMMA: /, ?/
WS: /[ \n]{1,4}/
"""

NAMED_GRAMMARS = {"json": "", "sql": SQL}
"""Name -> Lark text."""
UNKNOWN_GRAMMARS = ("python", "c", "java", "go")
"""Names that others know."""
