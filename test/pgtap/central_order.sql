-- Whatever way a history reaches central (late, doubled, cut into other batches), the end is the same.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();
SELECT setseed(0.7);

CREATE TABLE truth (entity text PRIMARY KEY, row jsonb);
CREATE TABLE history (seq bigint PRIMARY KEY, event json NOT NULL);
CREATE TABLE answers (sent int, receipt json);

-- What a branch does: inserts, updates and deletes of a few entities, two columns each.
CREATE PROCEDURE live(events int) LANGUAGE plpgsql AS $$
DECLARE
	e text;
	before jsonb;
	after jsonb;
	op text;
	changed jsonb;
BEGIN
	FOR n IN 1 .. events LOOP
		e := 'E' || floor(random() * 12);
		SELECT row INTO before FROM truth WHERE entity = e;
		op := CASE WHEN before IS NULL THEN 'insert' WHEN random() < 0.2 THEN 'delete' ELSE 'update' END;
		after := CASE op WHEN 'insert' THEN jsonb_build_object('a', n, 'b', -n)
			WHEN 'update' THEN before || CASE WHEN random() < 0.5 THEN jsonb_build_object('a', n) ELSE jsonb_build_object('b', -n) END END;
		changed := CASE op WHEN 'delete' THEN before WHEN 'update' THEN (SELECT jsonb_object_agg(key, value) FROM jsonb_each(before) WHERE after -> key <> value) END;
		INSERT INTO truth VALUES (e, after) ON CONFLICT (entity) DO UPDATE SET row = after;
		INSERT INTO history VALUES (n, json_build_object('specversion', '1.0', 'id', gen_random_uuid(), 'source', '/branches/b', 'type', 'softmobile.item.' || op,
			'subject', e, 'time', '2025-11-24T08:00:00Z', 'sequence', n::text, 'lane', 'high', 'epoch', '00000000-0000-4000-8000-000000000001', 'epochno', '1',
			'data', jsonb_strip_nulls(jsonb_build_object('new', after, 'old', changed))));
	END LOOP;
END $$;

-- Sends the history: in windows that are shuffled, with some events more than once.
CREATE PROCEDURE send(token bytea, spread int, doubled float) LANGUAGE plpgsql AS $$
DECLARE
	batch json;
	n int;
	sent int := 0;
	total int;
	size int;
BEGIN
	CREATE TEMP TABLE queue ON COMMIT DROP AS
		SELECT row_number() OVER (ORDER BY h.seq + random() * spread) AS place, h.event
		FROM history h CROSS JOIN LATERAL generate_series(1, CASE WHEN random() < doubled THEN 2 ELSE 1 END) AS copies;
	total := (SELECT count(*) FROM queue);
	WHILE sent < total LOOP
		size := 1 + floor(random() * 40);
		SELECT json_agg(event ORDER BY q.place), count(*) INTO batch, n FROM queue q WHERE q.place > sent AND q.place <= sent + size;
		INSERT INTO answers VALUES (n, softmobile.central_receive(batch::text, token)::json);
		sent := sent + size;
	END LOOP;
	DROP TABLE queue;
END $$;

CREATE FUNCTION is_history(kind text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
	token bytea := sha256(convert_to(softmobile.central_create_token('{b}', kind), 'UTF8'));
	spread int := CASE kind WHEN 'as it was' THEN 0 WHEN 'a little mixed' THEN 10 ELSE 1000 END;
	events CONSTANT int := 600;
BEGIN
	TRUNCATE truth, history, answers, softmobile.central_inbox, softmobile.central_projection, softmobile.central_lane, softmobile.central_span,
		softmobile.central_conflict, softmobile.central_fork;
	CALL live(events);
	CALL send(token, spread, CASE WHEN kind = 'as it was' THEN 0 ELSE 0.3 END);
	RETURN NEXT is((SELECT sum((receipt ->> 'accepted')::int)::int FROM answers), events, kind || ': each event is accepted once');
	RETURN NEXT is((SELECT sum((receipt ->> 'duplicates')::int)::int FROM answers), (SELECT sum(sent)::int - events FROM answers), kind || ': all others are duplicates');
	RETURN NEXT is((SELECT jsonb_object_agg(entity_id, row) FROM softmobile.central_projection), (SELECT jsonb_object_agg(entity, row) FROM truth), kind || ': central holds what the branch holds');
	RETURN NEXT is((SELECT (received, missing)::text FROM softmobile.central_lanes), format('("{[1,%s)}",{})', events + 1), kind || ': every number is there');
	RETURN NEXT is((SELECT count(*)::int FROM softmobile.central_conflict) + (SELECT count(*)::int FROM softmobile.central_fork), 0, kind || ': no conflict, no fork');
	CALL send(token, 1000, 0.3);
	RETURN NEXT is((SELECT sum((receipt ->> 'accepted')::int)::int FROM answers), events, kind || ': the whole history once more has no effect');
	RETURN NEXT is((SELECT jsonb_object_agg(entity_id, row) FROM softmobile.central_projection), (SELECT jsonb_object_agg(entity, row) FROM truth), kind || ': nor on the rows');
END $$;

SELECT is_history('as it was');
SELECT is_history('a little mixed');
SELECT is_history('a little mixed') FROM generate_series(1, 3);
SELECT is_history('quite mixed') FROM generate_series(1, 3);

SELECT * FROM finish();
ROLLBACK;
