-- central_project() does what set-based SQL would: the same rows, the same events left to central_apply().
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();
SELECT setseed(0.5);

-- The oracle: what central_project() was, in SQL.
CREATE FUNCTION differs(op text, held jsonb, old jsonb, new jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE op
	WHEN 'insert' THEN held IS NOT NULL AND held <> new
	WHEN 'update' THEN held IS NULL OR (held || old <> held AND held <> new)
	ELSE held IS NOT NULL AND held || old <> held END;
CREATE FUNCTION oracle(events softmobile.central_event[]) RETURNS integer[]
LANGUAGE plpgsql VOLATILE SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
	unusual integer[];
BEGIN
	WITH chained AS (
		-- Each event with the one before it in the batch; the first of an entity meets what central holds.
		SELECT e.*, lag(e.n) OVER entity IS NULL AS is_first, lead(e.n) OVER entity IS NULL AS is_last,
			lag(e.new) OVER entity AS before, lag(e.seq) OVER entity AS before_seq, lag(e.order_epoch) OVER entity AS before_epoch
		FROM unnest(events) AS e
		WINDOW entity AS (PARTITION BY e.entity_id, e.entity_type, e.branch_id ORDER BY e.order_epoch, e.seq)
	), checked AS (
		SELECT c.n, c.branch_id, c.entity_type, c.entity_id, c.seq, c.order_epoch, c.is_last, CASE WHEN c.op <> 'delete' THEN c.new END AS row,
			p.branch_id IS NOT NULL AS known,
			c.resolution IS NULL AND CASE
				WHEN NOT c.is_first THEN (c.order_epoch, c.seq) > (c.before_epoch, c.before_seq) AND NOT differs(c.op, c.before, c.old, c.new)
				WHEN p.branch_id IS NULL THEN true
				ELSE NOT p.changed_here AND (c.order_epoch, c.seq) > (p.epoch_no, p.seq) AND NOT differs(c.op, p.row, c.old, c.new)
				END AS usual
		FROM chained c
			LEFT JOIN softmobile.central_projection p ON p.branch_id = c.branch_id AND p.entity_type = c.entity_type AND p.entity_id = c.entity_id
	), judged AS MATERIALIZED (
		SELECT c.*, bool_and(c.usual) OVER (PARTITION BY c.entity_id, c.entity_type, c.branch_id) AS all_usual FROM checked c
	), added AS (
		INSERT INTO softmobile.central_projection (branch_id, entity_type, entity_id, seq, changed_at, epoch_no, deleted, changed_here, row)
		SELECT j.branch_id, j.entity_type, j.entity_id, j.seq, now(), j.order_epoch, j.row IS NULL, false, j.row
		FROM judged j WHERE j.is_last AND j.all_usual AND NOT j.known
	), changed AS (
		UPDATE softmobile.central_projection t SET seq = j.seq, changed_at = now(), epoch_no = j.order_epoch, deleted = j.row IS NULL, row = j.row
		FROM judged j
		WHERE j.is_last AND j.all_usual AND j.known AND t.branch_id = j.branch_id AND t.entity_type = j.entity_type AND t.entity_id = j.entity_id
	)
	SELECT array_agg(j.n) INTO unusual FROM judged j WHERE NOT j.all_usual;
	RETURN unusual;
END
$$;

-- Events of few entities, few values: they often fit what is held, or the one before them, and often not.
CREATE FUNCTION few(chance float) RETURNS jsonb LANGUAGE sql VOLATILE RETURN CASE WHEN random() < chance THEN jsonb_build_object('a', floor(random() * 2), 'b', floor(random() * 2)) END;
CREATE FUNCTION batch(size int, ids text[]) RETURNS softmobile.central_event[] LANGUAGE plpgsql AS $$
DECLARE
	events softmobile.central_event[] := '{}';
	e softmobile.central_event;
	rows jsonb := '{}';
	entity text;
	before jsonb;
BEGIN
	FOR n IN 1 .. size LOOP
		e := NULL;
		e.n := n;
		e.branch_id := 'b' || floor(random() * 2);
		e.entity_type := (ARRAY['item', 'sale'])[1 + floor(random() * 2)::int];
		e.entity_id := ids[1 + floor(random() * cardinality(ids))::int];
		e.epoch_no := CASE WHEN random() < 0.95 THEN 5 ELSE 4 END;
		e.order_epoch := CASE WHEN random() < 0.05 THEN 0 ELSE e.epoch_no END;
		e.seq := 1000 * coalesce((SELECT max(p.seq) / 1000 + 1 FROM softmobile.central_projection p), 1) + n + CASE WHEN random() < 0.05 THEN -2000 ELSE 0 END;
		e.resolution := CASE WHEN random() < 0.03 THEN 'local' END;
		entity := concat_ws(' ', e.branch_id, e.entity_type, e.entity_id);
		before := coalesce(rows -> entity, (SELECT p.row FROM softmobile.central_projection p WHERE (p.branch_id, p.entity_type, p.entity_id) = (e.branch_id, e.entity_type, e.entity_id)));
		before := CASE WHEN random() < 0.1 THEN few(0.5) ELSE nullif(before, 'null') END;
		e.op := CASE WHEN before IS NULL THEN 'insert' WHEN random() < 0.2 THEN 'delete' ELSE 'update' END;
		e.new := CASE WHEN e.op <> 'delete' THEN few(1) END;
		e.old := CASE e.op WHEN 'delete' THEN before WHEN 'update' THEN CASE WHEN random() < 0.5 THEN before - 'a' ELSE before END END;
		rows := rows || jsonb_build_object(entity, e.new);
		events := events || e;
	END LOOP;
	RETURN events;
END $$;
CREATE FUNCTION held() RETURNS jsonb LANGUAGE sql VOLATILE RETURN (SELECT jsonb_agg(to_jsonb(p) ORDER BY p.branch_id, p.entity_type, p.entity_id) FROM softmobile.central_projection p);
CREATE TABLE compared (n int, events softmobile.central_event[], unusual int[], expected_unusual int[], rows jsonb, expected_rows jsonb);
CREATE PROCEDURE compare(times int, most int, ids text[]) LANGUAGE plpgsql AS $$
DECLARE
	c compared;
BEGIN
	FOR n IN 1 .. times LOOP
		c.n := n;
		c.events := batch(floor(random() * most)::int, ids);
		BEGIN
			c.expected_unusual := ARRAY(SELECT unnest(oracle(c.events)) ORDER BY 1);
			c.expected_rows := held();
			RAISE EXCEPTION USING ERRCODE = 'XX999';
		EXCEPTION WHEN SQLSTATE 'XX999' THEN
			NULL;
		END;
		c.unusual := ARRAY(SELECT unnest(softmobile.central_project(c.events)) ORDER BY 1);
		c.rows := held();
		INSERT INTO compared SELECT (c).*;
		IF random() < 0.3 THEN
			UPDATE softmobile.central_projection p SET changed_here = NOT p.changed_here WHERE p.entity_id = '2';
		ELSIF random() < 0.3 THEN
			DELETE FROM softmobile.central_projection p WHERE p.entity_id = '1';
		END IF;
	END LOOP;
END $$;
CALL compare(800, 12, '{1,10,2,é}');

SELECT is((SELECT jsonb_agg(to_jsonb(c)) FROM compared c WHERE (c.unusual, c.rows) IS DISTINCT FROM (c.expected_unusual, c.expected_rows)), NULL, 'rows and unusual events are those of the oracle');
SELECT cmp_ok((SELECT count(*) FROM compared WHERE unusual = '{}' AND cardinality(events) > 2), '>', 50::bigint, 'often all was usual');
SELECT cmp_ok((SELECT count(*) FROM compared WHERE cardinality(unusual) BETWEEN 1 AND cardinality(events) - 1), '>', 50::bigint, 'and often some was not');
SELECT is((SELECT count(*) FROM compared c WHERE c.unusual <> '{}' AND EXISTS (SELECT FROM unnest(c.events) AS e WHERE e.n = ANY (c.unusual)
	AND EXISTS (SELECT FROM unnest(c.events) AS f WHERE (f.branch_id, f.entity_type, f.entity_id) = (e.branch_id, e.entity_type, e.entity_id) AND f.n <> ALL (c.unusual)))), 0::bigint, 'an entity is left whole');
SELECT is(softmobile.central_project('{}'), NULL, 'of no events none is unusual');
SELECT throws_ok($$SELECT softmobile.central_project(ARRAY[jsonb_populate_record(NULL::softmobile.central_event, '{"n":1}')])$$, 'XX000', NULL, 'an event without an entity is an error');
SELECT throws_ok($$SELECT softmobile.central_project(ARRAY[jsonb_populate_record(NULL::softmobile.central_event, '{"n":1,"branch_id":"b","entity_type":"t","entity_id":"e","op":"update","seq":1,"order_epoch":1}')])$$,
	'XX000', NULL, '... without rows as well');

-- Many entities, near each other and far, some of them long and alike: the index is walked, or descended for each.
TRUNCATE softmobile.central_projection, compared;
CREATE TABLE ids AS
	SELECT n, CASE n % 4 WHEN 0 THEN 'é' || n WHEN 1 THEN repeat('a long way to go ', 60) || n ELSE n::text END AS id FROM generate_series(1, 1200) AS n;
INSERT INTO softmobile.central_projection (branch_id, entity_type, entity_id, seq, changed_at, epoch_no, deleted, changed_here, row)
SELECT b, t, id, 1, now(), 1, false, false, few(1) FROM ids, unnest('{b0,b1}'::text[]) AS b, unnest('{item,sale}'::text[]) AS t WHERE n % 3 > 0 AND n < 1000;
CREATE FUNCTION ids(low int, high int) RETURNS text[] LANGUAGE sql RETURN ARRAY(SELECT id FROM ids WHERE n BETWEEN low AND high);
CALL compare(12, 120, ids(1, 1200));
CALL compare(12, 120, ids(100, 140));
CALL compare(12, 120, ids(900, 1200));
SELECT is((SELECT jsonb_agg(to_jsonb(c)) FROM compared c WHERE (c.unusual, c.rows) IS DISTINCT FROM (c.expected_unusual, c.expected_rows)), NULL, '... and of many entities');
SELECT cmp_ok((SELECT count(*) FROM compared, unnest(events) AS e WHERE e.n <> ALL (unusual)), '>', 1000::bigint, '... most of which are as usual');

-- What headquarters hangs on the table is heeded.
CREATE TABLE seen (op text, entity_id text);
CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen VALUES (tg_op, new.entity_id); RETURN NULL; END $$;
CREATE TRIGGER see AFTER INSERT OR UPDATE ON softmobile.central_projection FOR EACH ROW EXECUTE FUNCTION see();
CREATE INDEX ON softmobile.central_projection ((row ->> 'a')) WHERE NOT deleted;
ALTER TABLE softmobile.central_projection ADD CONSTRAINT sane CHECK (entity_id <> 'insane') NOT VALID;
CREATE FUNCTION one(id text, seq bigint, old jsonb, new jsonb) RETURNS softmobile.central_event[] LANGUAGE sql RETURN ARRAY[ROW(1, 't', NULL, NULL, 5, 'high', seq, 5, 'item', id,
	CASE WHEN old IS NULL THEN 'insert' ELSE 'update' END, now(), NULL, NULL, NULL, NULL, new, old)::softmobile.central_event];
SELECT is(softmobile.central_project(one('x', 1, NULL, '{"a":"p"}')), NULL, 'a row is inserted');
SELECT is(softmobile.central_project(one('x', 2, '{"a":"p"}', '{"a":"q"}')), NULL, 'and updated');
SELECT is((SELECT array_agg(op || ' ' || entity_id) FROM seen), '{"INSERT x","UPDATE x"}', 'row triggers fire');
SET LOCAL enable_seqscan = off;
SELECT is((SELECT array_agg(entity_id) FROM softmobile.central_projection WHERE row ->> 'a' = 'q' AND NOT deleted), '{x}', 'other indexes follow');
SELECT throws_ok($$SELECT softmobile.central_project(one('insane', 3, NULL, '{}'))$$, '23514', NULL, 'constraints are checked');

SELECT * FROM finish();
ROLLBACK;
