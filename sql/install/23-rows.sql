/*
 * The rows of attached tables, as SQL text: their columns as capture and events
 * have them, for functions that read the tables of others.
 *
 * Such a query runs as the owner of the table, by read_as_owner(): never as the
 * owner of the extension, a superuser, who would run what the table's owner has
 * written into it, such as the function of an index.  Nor does it execute a cast
 * that a user wrote: what is compared is what events show.  It runs with
 * TimeZone UTC, DateStyle ISO, IntervalStyle postgres, bytea_output hex and
 * extra_float_digits 1, under which events are written; row_security off makes
 * a row that the owner may not see an error.
 */

CREATE FUNCTION softmobile.read_as_owner(relation regclass, query text) RETURNS SETOF record
LANGUAGE c STABLE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'softmobile_read_as_owner';
COMMENT ON FUNCTION softmobile.read_as_owner(regclass, text) IS
'Internal: rows of a query on one table, run with the rights of the table''s owner in a security-restricted operation, as ANALYZE does.';

CREATE TYPE softmobile.table_rows AS (
	relation regclass,
	query text
);
COMMENT ON TYPE softmobile.table_rows IS 'Internal: SQL for rows of an attached table, to be run by read_as_owner().';

CREATE FUNCTION softmobile.rows_of_all(parts softmobile.table_rows[], what text, condition text, columns text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
RETURN (SELECT string_agg(format('SELECT * FROM softmobile.read_as_owner(%L, %L) AS r (%s)', p.relation::oid,
		format('SELECT %s FROM (%s) AS s %s', what, p.query, condition), columns), ' UNION ALL ')
	FROM unnest(parts) AS p);
COMMENT ON FUNCTION softmobile.rows_of_all(softmobile.table_rows[], text, text, text) IS
'Internal: SQL for rows of several tables, each read as its owner. what, condition: SELECT list, and WHERE or GROUP BY, over the rows s of each table; columns: names and types of what that returns.';

CREATE FUNCTION softmobile.column_text(relation regclass, column_name name, form text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	expression text := 't.' || quote_ident(column_name);
	base pg_type := softmobile.column_type(relation, column_name);
BEGIN
	IF base.oid IS NULL THEN
		RETURN 'NULL::text';
	END IF;
	-- An ordinary user's type may have a cast to text or json that he wrote. Enums and ranges are put out by PostgreSQL's
	-- own functions; base types are made by superusers only.
	IF base.oid >= 16384 AND base.typtype IN ('e', 'r', 'm') THEN
		expression := format('CASE WHEN %1$s IS NOT NULL THEN format(''%%s'', %1$s) END', expression);
	ELSIF base.oid >= 16384 AND (base.typtype <> 'b' OR base.typelem <> 0 AND (SELECT e.typtype <> 'b' OR e.typelem <> 0 FROM pg_type e WHERE e.oid = base.typelem)) THEN
		RAISE EXCEPTION 'column "%" of % cannot be read as text', column_name, relation
			USING ERRCODE = 'feature_not_supported', DETAIL = format('It is of type %s.', format_type(base.oid, NULL)),
				HINT = format('Call softmobile.detach(%L), and attach the table again with columns of simple types as key, branch, folio, SKU, amount and quantity.', relation);
	END IF;
	RETURN CASE
		WHEN form = 'json' THEN format('to_json(%s)::text', expression)
		-- The same as below, in less time; and json, which an entity_id takes as it is.
		WHEN base.oid = ANY ('{int2, int4, int8, numeric, bool, text, varchar, uuid}'::regtype[]) OR form = 'id' AND base.oid = 'json'::regtype
			THEN expression || '::text'
		WHEN form = 'id' THEN format('(to_json(%s) #>> ''{}'')', expression)
		ELSE format('(to_jsonb(%s) #>> ''{}'')', expression) END;
END
$$;
COMMENT ON FUNCTION softmobile.column_text(regclass, name, text) IS
'Internal: SQL for a column of table t as events show it. form id: as in an entity_id; value: as central reads it in its jsonb; json: its JSON. A column that the table does not have is NULL. Error: 0A000 a composite type, or an array of enums, ranges or composite types.';

CREATE FUNCTION softmobile.usable_branch(value text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN octet_length(btrim(value, ' ')) BETWEEN 1 AND 100 AND btrim(value, ' ') !~ '[\u0001-\u001f\u007f]' THEN btrim(value, ' ') END;
COMMENT ON FUNCTION softmobile.usable_branch(text) IS
'Internal: the branch id that a branch column holds, as capture reads it; NULL when it is none. No search_path, so that it is inlined; its operators were bound when it was created.';

CREATE FUNCTION softmobile.entity_id_of(c softmobile.captured_table) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN CASE cardinality(c.key_columns)
	WHEN 1 THEN format('coalesce(%s, '''')', softmobile.column_text(c.relation, c.key_columns[1], 'id'))
	ELSE (SELECT format('''['' || %s || '']''', string_agg(format('coalesce(%s, ''null'')', softmobile.column_text(c.relation, k.name, 'json')), ' || '','' || ' ORDER BY k.n))
		FROM unnest(c.key_columns) WITH ORDINALITY AS k (name, n)) END;
COMMENT ON FUNCTION softmobile.entity_id_of(softmobile.captured_table) IS 'Internal: SQL for the entity_id of a row of t.';

CREATE FUNCTION softmobile.branch_of(c softmobile.captured_table, otherwise text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN CASE cardinality(c.branch_columns)
	WHEN 0 THEN quote_literal(otherwise)
	ELSE (SELECT format('coalesce(%s, %L)', string_agg(format(
			-- The text of a number or UUID needs no look.
			CASE WHEN (softmobile.column_type(c.relation, b.name)).oid = ANY ('{int2, int4, int8, uuid}'::regtype[]) THEN '%s' ELSE 'softmobile.usable_branch(%s)' END,
			softmobile.column_text(c.relation, b.name, 'id')), ', ' ORDER BY b.n), otherwise)
		FROM unnest(c.branch_columns) WITH ORDINALITY AS b (name, n)) END;
COMMENT ON FUNCTION softmobile.branch_of(softmobile.captured_table, text) IS 'Internal: SQL for the branch of a row of t; otherwise: of rows whose branch columns name none.';

CREATE FUNCTION softmobile.rows_of_its_own(relation regclass) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT format('t.tableoid <> ALL (%L::oid[])', array_agg(o.oid ORDER BY o.oid)) FROM (
		SELECT r.oid FROM softmobile.tree_of(relation) AS o JOIN pg_class r ON r.oid = o WHERE r.relkind NOT IN ('r', 'p')
		UNION
		SELECT o::oid FROM softmobile.tree_of(relation) AS child JOIN softmobile.captured_table c ON c.relation = child AND child <> rows_of_its_own.relation
			CROSS JOIN LATERAL softmobile.tree_of(child) AS o) AS o
	HAVING count(*) > 0;
END;
COMMENT ON FUNCTION softmobile.rows_of_its_own(regclass) IS
'Internal: SQL that is true for the rows of t that are captured as its own: not those of foreign partitions, which nothing captures, and of children that are attached by themselves. NULL: all are.';
