/*
 * Control of receipts by their folios: what is in the attached tables now.
 *
 * A folio is a series, its text up to the trailing digits, and a number, these
 * digits.  A number that no row of the series has, between two that rows have,
 * is missing on the day of the higher one, whatever day it belongs to.
 */

CREATE FUNCTION softmobile.receipts_of(entity integer, branch text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	otherwise text := coalesce(nullif(softmobile.database_setting('softmobile.branch_id'), ''), current_database());
	c softmobile.captured_table;
	branch_sql text;
	dated boolean;
	undated boolean;
	part text;
	parts text[] := '{}';
BEGIN
	FOR c IN SELECT t.* FROM softmobile.captured_table t WHERE t.entity_no = entity AND t.folio_column IS NOT NULL ORDER BY t.relation::text LOOP
		branch_sql := softmobile.branch_of(c, otherwise);
		dated := coalesce(softmobile.column_kind(c.relation, c.date_column) = 'date', false);
		undated := true;
		IF dated THEN
			SELECT r.undated INTO undated
			FROM softmobile.read_as_owner(c.relation, format('SELECT EXISTS (SELECT FROM %s AS t WHERE t.%I IS NULL)', c.relation, c.date_column)) AS r (undated boolean);
		END IF;
		part := softmobile.rows_of_all(ARRAY[ROW(c.relation, format('SELECT %s, nullif(btrim(%s), ''''), %s, %s, %s FROM %s AS t WHERE %s',
				branch_sql, softmobile.column_text(c.relation, c.folio_column, 'id'),
				CASE WHEN dated THEN format('t.%I::date', c.date_column) ELSE 'NULL::date' END,
				CASE WHEN softmobile.column_kind(c.relation, c.amount_column) = 'number' THEN format('t.%I::numeric', c.amount_column) ELSE 'NULL::numeric' END,
				CASE WHEN undated THEN softmobile.entity_id_of(c) ELSE 'NULL::text' END,
				c.relation, concat_ws(' AND ', 'true', softmobile.rows_of_its_own(c.relation), branch_sql || ' = ' || quote_literal(branch))))::softmobile.table_rows],
			'*', '', 'branch_id text, folio text, day date, amount numeric, entity_id text');
		parts := parts || CASE WHEN undated THEN format(
				'SELECT s.branch_id, s.folio, coalesce(s.day, log.day) AS day, s.amount FROM (%s) AS s'
				' LEFT JOIN (SELECT e.entity_id, max(e.created_at)::date AS day FROM softmobile.outbox_event e WHERE e.entity_no = %s AND e.op = ''i'' GROUP BY e.entity_id) AS log USING (entity_id)',
				part, entity)
			ELSE format('SELECT s.branch_id, s.folio, s.day, s.amount FROM (%s) AS s', part) END;
	END LOOP;
	RETURN '(' || array_to_string(parts, ' UNION ALL ') || ')';
END
$$;
COMMENT ON FUNCTION softmobile.receipts_of(integer, text) IS
'Internal: SQL for the rows (branch_id, folio, day, amount) of an entity type''s tables with a folio, of one branch or (NULL) all.';

CREATE FUNCTION softmobile.folio_control_of(branch text DEFAULT NULL, "from" date DEFAULT NULL, "to" date DEFAULT NULL)
RETURNS TABLE (branch_id text, entity_type text, series text, day date, first text, last text, count bigint, gaps numeric, duplicates bigint, total numeric,
	missing int8multirange, doubled text[], without_folio bigint, problem text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET row_security = off
SET TimeZone = 'UTC' SET DateStyle = 'ISO' SET IntervalStyle = 'postgres' SET bytea_output = 'hex' SET extra_float_digits = 1
SET work_mem = '64MB' SET jit = off
AS $$
DECLARE
	entity softmobile.outbox_entity;
BEGIN
	PERFORM softmobile.known_branch(branch);
	IF "from" > "to" THEN
		RAISE EXCEPTION 'the dates are reversed: % is after %', "from", "to"
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Give the earlier date as "from", the later as "to"; both are included.';
	END IF;
	FOR entity IN
		SELECT e.* FROM softmobile.outbox_entity e
		WHERE EXISTS (SELECT FROM softmobile.captured_table c WHERE c.entity_no = e.entity_no AND c.folio_column IS NOT NULL)
		ORDER BY e.entity_type
	LOOP
		BEGIN
			RETURN QUERY EXECUTE format($query$
				-- OFFSET 0: each stage computes its columns once.  Two windows, so that the second one's order serves GROUP BY.
				WITH receipt AS (
					SELECT r.branch_id COLLATE "C" AS branch_id, r.folio COLLATE "C" AS folio, rtrim(r.folio, '0123456789') COLLATE "C" AS series, r.day, r.amount
					FROM (%s OFFSET 0) AS r OFFSET 0
				), numbered AS (
					-- 131072 digits are the most that a numeric has.
					SELECT r.*, CASE WHEN length(r.folio) - length(r.series) BETWEEN 1 AND 131072 THEN substr(r.folio, length(r.series) + 1)::numeric END AS number
					FROM receipt r OFFSET 0
				), in_series AS (
					SELECT n.*, lag(n.number) OVER w AS before, lag(n.folio) OVER w = n.folio AS again
					FROM numbered n
					WINDOW w AS (PARTITION BY n.branch_id, n.series ORDER BY n.number, n.folio, n.day) OFFSET 0
				), placed AS (
					SELECT i.*, row_number() OVER w = 1 AS lowest, lead(true) OVER w IS NULL AS highest
					FROM in_series i
					WINDOW w AS (PARTITION BY i.branch_id, i.series, i.day ORDER BY i.number, i.folio)
				), result AS (
					SELECT p.branch_id, p.series, p.day,
						max(p.folio) FILTER (WHERE p.lowest) AS first, max(p.folio) FILTER (WHERE p.highest) AS last, count(p.folio) AS count,
						coalesce(sum(p.number - p.before - 1) FILTER (WHERE p.number - p.before > 1), 0) AS gaps,
						count(*) FILTER (WHERE p.again) AS duplicates, sum(p.amount) AS total,
						-- As far as they are bigints.
						coalesce(range_agg(int8range((p.before + 1)::bigint, least(p.number, 9223372036854775807)::bigint))
							FILTER (WHERE p.number - p.before > 1 AND p.before < 9223372036854775806), '{}'::int8multirange) AS missing,
						coalesce(array_agg(DISTINCT p.folio) FILTER (WHERE p.again), '{}') AS doubled,
						count(*) FILTER (WHERE p.folio IS NULL) AS without_folio
					FROM placed p
					GROUP BY p.branch_id, p.series, p.day
					HAVING ($1 IS NULL OR p.day >= $1) AND ($2 IS NULL OR p.day <= $2)
				)
				-- Counted first: an error comes before the first row.
				SELECT r.branch_id::text, %L, r.series::text, r.day, r.first::text, r.last::text, r.count, r.gaps, r.duplicates, r.total, r.missing, r.doubled, r.without_folio, NULL::text
				FROM result r WHERE (SELECT count(*) FROM result) > 0
				ORDER BY r.branch_id, r.series, r.day$query$,
				softmobile.receipts_of(entity.entity_no, branch), entity.entity_type) USING "from", "to";
		EXCEPTION WHEN OTHERS THEN
			RETURN QUERY SELECT branch, entity.entity_type, NULL, NULL::date, NULL, NULL, NULL::bigint, NULL::numeric, NULL::bigint, NULL::numeric,
				NULL::int8multirange, NULL::text[], NULL::bigint, 'its tables cannot be read: ' || SQLERRM;
		END;
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.folio_control_of(text, date, date) IS
'folio_control for one branch (NULL: all) and the days from ... to, both included (NULL: no limit; with a limit, rows without a day are left out). Gaps and duplicates are those of the whole series. Errors: 42704 unknown branch, 22023 dates reversed.';

CREATE VIEW softmobile.folio_control AS SELECT * FROM softmobile.folio_control_of(NULL, NULL, NULL);
COMMENT ON VIEW softmobile.folio_control IS
'Receipts in the attached tables that have a folio column, by branch, entity type, series and day. For one branch or some days folio_control_of() is faster.';
COMMENT ON COLUMN softmobile.folio_control.series IS 'The folio''s text up to its trailing digits, which are its number. NULL: the rows without a folio (NULL or blank).';
COMMENT ON COLUMN softmobile.folio_control.day IS 'UTC date of the date column, or if it is NULL or there is none, of the row''s insert event in the log. NULL: not known.';
COMMENT ON COLUMN softmobile.folio_control.first IS 'Folio with the lowest number of that day; last: with the highest.';
COMMENT ON COLUMN softmobile.folio_control.gaps IS 'How many numbers are missing between this day''s numbers and the number before each in the series, which may be of another day.';
COMMENT ON COLUMN softmobile.folio_control.duplicates IS 'How many rows have a folio that another row has already, of that day or an earlier one; doubled: which folios.';
COMMENT ON COLUMN softmobile.folio_control.missing IS 'The missing numbers, as far as they are bigints.';
COMMENT ON COLUMN softmobile.folio_control.problem IS 'Not NULL: the tables of this entity type could not be read, and why; nothing else is known then.';
