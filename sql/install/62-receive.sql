/*
 * Headquarters: a batch becomes events, numbers, rows.
 *
 * A batch as our worker writes it is read by central_parse(), all others event by
 * event.
 *
 * The usual batch goes through set-based statements, one per table.  What is unusual
 * about single events (malformed, known, late, in conflict, with a resolution) is found
 * by them and then handled event by event, where a person can follow it.
 */

CREATE TYPE softmobile.central_event AS (
	n integer,
	branch_id text COLLATE "C",
	id uuid,
	epoch uuid,
	epoch_no integer,
	lane text COLLATE "C",
	seq bigint,
	order_epoch integer,
	entity_type text COLLATE "C",
	entity_id text COLLATE "C",
	op text COLLATE "C",
	event_time timestamptz,
	actor text,
	reason text,
	resolution text,
	data json,
	new jsonb,
	old jsonb
);
COMMENT ON TYPE softmobile.central_event IS 'Internal: an event of a batch, its place in it (n), and by what it is ordered (order_epoch, seq).';

CREATE FUNCTION softmobile.central_decode(value text) RETURNS text
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'softmobile_central_decode';
COMMENT ON FUNCTION softmobile.central_decode(text) IS 'Internal: undoes percent-encoding. Error: 22021 no UTF-8.';

CREATE FUNCTION softmobile.central_parse(body text) RETURNS softmobile.central_event[]
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'softmobile_central_parse';
COMMENT ON FUNCTION softmobile.central_parse(text) IS
'Internal: the events of a batch; NULL or an error of class 22 or 54 when it is not as our branches write it: then central_parse_event() says which event, and why.';

CREATE FUNCTION softmobile.central_said_twice(doc json) RETURNS text
LANGUAGE sql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp
RETURN CASE json_typeof(doc) WHEN 'object' THEN (SELECT k.name FROM json_object_keys(doc) AS k (name) GROUP BY k.name HAVING count(*) > 1 LIMIT 1) END;
COMMENT ON FUNCTION softmobile.central_said_twice(json) IS 'Internal: a member that the object has twice: whoever reads it may take the one or the other. NULL: there is none.';

CREATE FUNCTION softmobile.central_parse_event(doc json, place integer) RETURNS softmobile.central_event
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	e softmobile.central_event;
	r record;
	problem text;
	bad_value CONSTANT text := 'invalid_parameter_value';
BEGIN
	SELECT * INTO r FROM json_to_record(doc) AS x (specversion text, id text, source text, type text, subject text, "time" text,
		sequence text, lane text, epoch text, epochno text, reason text, actor text, resolution text, snapshot text, data json);
	problem := CASE
		WHEN softmobile.central_said_twice(doc) IS NOT NULL THEN format('attribute %s is there twice', left(softmobile.central_said_twice(doc), 100))
		WHEN r.specversion <> '1.0' THEN 'specversion must be 1.0'
		WHEN r.id !~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN 'id must be a UUID'
		WHEN r.source ~ '^/branches/.' IS NOT TRUE THEN 'source must be /branches/<branch>'
		WHEN r.type ~ '^softmobile\.[^.]+\.(insert|update|delete)$' IS NOT TRUE THEN 'type must be softmobile.<entity type>.<insert, update or delete>'
		WHEN octet_length(split_part(r.type, '.', 2)) > 100 THEN 'the entity type must be at most 100 bytes long'
		WHEN coalesce(r.subject, '') = '' THEN 'subject must be the entity''s id'
		-- With branch and entity type it is an index key, which has at most 2704 bytes.
		WHEN octet_length(r.subject) > 2000 THEN 'subject must be at most 2000 bytes long'
		WHEN r.sequence ~ '^[0-9]+$' IS NOT TRUE OR r.sequence::numeric NOT BETWEEN 1 AND 9223372036854775806 THEN 'sequence must be a number from 1 to 9223372036854775806'
		WHEN r.lane IN ('high', 'normal', 'low') IS NOT TRUE THEN 'lane must be high, normal or low'
		WHEN r.epoch ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' IS NOT TRUE THEN 'epoch must be a UUID'
		WHEN r.epochno !~ '^[0-9]+$' OR r.epochno::numeric NOT BETWEEN 1 AND 2147483647 THEN 'epochno must be a positive integer'
		WHEN r."time" ~* '^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$' IS NOT TRUE THEN 'time must be an RFC 3339 time'
		WHEN r.resolution NOT IN ('local', 'central') THEN 'resolution must be local or central'
		WHEN json_typeof(r.data) IS DISTINCT FROM 'object' THEN 'data must be an object'
		WHEN r.type NOT LIKE '%.delete' AND json_typeof(r.data -> 'new') IS DISTINCT FROM 'object' THEN 'data.new must be the row'
		WHEN r.type NOT LIKE '%.insert' AND json_typeof(r.data -> 'old') IS DISTINCT FROM 'object' THEN 'data.old must be the values before the change'
		-- What a column of type json holds is not looked at.
		WHEN coalesce(softmobile.central_said_twice(r.data), softmobile.central_said_twice(r.data -> 'new'), softmobile.central_said_twice(r.data -> 'old')) IS NOT NULL
			THEN 'data has a member, or a row a column, twice'
		END;
	IF problem IS NOT NULL THEN
		RAISE EXCEPTION '%', problem USING ERRCODE = bad_value;
	END IF;
	BEGIN
		e.event_time := r."time"::timestamptz;
	EXCEPTION WHEN data_exception THEN
		RAISE EXCEPTION 'time must be an RFC 3339 time' USING ERRCODE = bad_value;
	END;
	e.n := place;
	e.branch_id := softmobile.central_decode(substr(r.source, 11));
	e.id := r.id;
	e.epoch := r.epoch;
	e.epoch_no := coalesce(r.epochno::integer, (SELECT max(l.epoch_no) FROM softmobile.central_lane l WHERE l.branch_id = e.branch_id AND l.epoch = e.epoch),
		(SELECT max(l.epoch_no) + 1 FROM softmobile.central_lane l WHERE l.branch_id = e.branch_id), 1);
	e.lane := r.lane;
	e.seq := r.sequence;
	e.order_epoch := CASE WHEN r.snapshot = 'true' THEN 0 ELSE e.epoch_no END;
	e.entity_type := split_part(r.type, '.', 2);
	e.entity_id := r.subject;
	e.op := split_part(r.type, '.', 3);
	e.actor := r.actor;
	e.reason := r.reason;
	e.resolution := r.resolution;
	e.data := r.data;
	e.new := r.data::jsonb -> 'new';
	e.old := r.data::jsonb -> 'old';
	RETURN e;
END
$$;
COMMENT ON FUNCTION softmobile.central_parse_event(json, integer) IS
'Internal: one event of a batch; without epochno, epochs are ordered as they were first seen. An error of class 22 or 54 says what is wrong with it.';

/* Numbers. */

CREATE FUNCTION softmobile.central_add_numbers(branch text, epoch uuid, lane text, void boolean, numbers int8multirange) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	n int8range;
	low bigint;
	high bigint;
	at_low bigint;
	before softmobile.central_span;
BEGIN
	FOREACH n IN ARRAY ARRAY(SELECT unnest(numbers)) LOOP
		low := lower(n);
		high := upper(n) - 1;
		at_low := low;
		-- The span that begins at or before this range grows, if it reaches it.
		SELECT * INTO before FROM softmobile.central_span s
		WHERE s.branch_id = branch AND s.epoch = central_add_numbers.epoch AND s.lane = central_add_numbers.lane
			AND s.void = central_add_numbers.void AND s.first_seq <= low
		ORDER BY s.first_seq DESC LIMIT 1;
		IF FOUND AND before.last_seq >= low - 1 THEN
			at_low := before.first_seq;
			high := greatest(high, before.last_seq);
		END IF;
		-- Spans behind that are now reached become part of it; they do not touch each other, so only the last can reach further.
		WITH reached AS (
			DELETE FROM softmobile.central_span s
			WHERE s.branch_id = branch AND s.epoch = central_add_numbers.epoch AND s.lane = central_add_numbers.lane
				AND s.void = central_add_numbers.void AND s.first_seq > at_low AND s.first_seq <= high + 1
			RETURNING s.last_seq)
		SELECT greatest(high, max(r.last_seq)) INTO high FROM reached r;
		INSERT INTO softmobile.central_span AS s (branch_id, epoch, lane, void, first_seq, last_seq)
		VALUES (branch, central_add_numbers.epoch, central_add_numbers.lane, central_add_numbers.void, at_low, high)
		ON CONFLICT ON CONSTRAINT central_span_pkey DO UPDATE SET last_seq = excluded.last_seq;
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.central_add_numbers(text, uuid, text, boolean, int8multirange) IS
'Internal: adds numbers to the received (void false) or void ones of a lane. The caller has locked the branch.';

CREATE FUNCTION softmobile.central_complete(branch text, epoch uuid, lane text, after bigint, before bigint) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN (SELECT coalesce(sum(least(s.last_seq, before - 1) - greatest(s.first_seq, after + 1) + 1), 0) >= before - after - 1
	FROM softmobile.central_span s
	WHERE s.branch_id = branch AND s.epoch = central_complete.epoch AND s.lane = central_complete.lane
		AND s.first_seq < before AND s.last_seq > after);
COMMENT ON FUNCTION softmobile.central_complete(text, uuid, text, bigint, bigint) IS
'Internal: whether every number between these two (both excluded) was received or is void.';

CREATE TYPE softmobile.central_batch_lane AS (
	branch_id text COLLATE "C",
	epoch uuid,
	lane text COLLATE "C",
	epoch_no integer,
	low bigint,
	high bigint,
	events bigint,
	ascending boolean
);
COMMENT ON TYPE softmobile.central_batch_lane IS 'Internal: what a batch has of a lane. ascending: in the order of the events each number is higher than the one before, so that all are different.';

CREATE FUNCTION softmobile.central_numbers(events softmobile.central_event[]) RETURNS SETOF softmobile.central_batch_lane
LANGUAGE c STABLE STRICT ROWS 3 AS 'MODULE_PATHNAME', 'softmobile_central_numbers';
COMMENT ON FUNCTION softmobile.central_numbers(softmobile.central_event[]) IS
'Internal: the lanes of these events, with their lowest and highest numbers.';

CREATE FUNCTION softmobile.central_take_numbers(events softmobile.central_event[]) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	s softmobile.central_batch_lane;
	numbers bigint;
	highest bigint;
	forks bigint;
BEGIN
	FOR s IN SELECT * FROM softmobile.central_numbers(events) LOOP
		numbers := s.events;
		IF NOT s.ascending THEN
			SELECT count(DISTINCT e.seq) INTO numbers FROM unnest(events) AS e WHERE (e.branch_id, e.epoch, e.lane) = (s.branch_id, s.epoch, s.lane);
		END IF;
		SELECT l.highest_seq INTO highest FROM softmobile.central_lane l
		WHERE l.branch_id = s.branch_id AND l.epoch = s.epoch AND l.lane = s.lane;
		IF s.low <= highest OR numbers < s.events THEN
			INSERT INTO softmobile.central_fork (branch_id, id, epoch, lane, seq, seen_at)
			SELECT e.branch_id, e.id, e.epoch, e.lane, e.seq, now()
			FROM (SELECT e.*, row_number() OVER (PARTITION BY e.seq ORDER BY e.n) AS nth FROM unnest(events) AS e
				WHERE (e.branch_id, e.epoch, e.lane) = (s.branch_id, s.epoch, s.lane)) AS e
			WHERE e.nth > 1 OR (SELECT f.last_seq FROM softmobile.central_span f
				WHERE f.branch_id = s.branch_id AND f.epoch = s.epoch AND f.lane = s.lane AND NOT f.void AND f.first_seq <= e.seq
				ORDER BY f.first_seq DESC LIMIT 1) >= e.seq;
			GET DIAGNOSTICS forks = ROW_COUNT;
			IF forks > 0 THEN
				RAISE WARNING 'two servers send as branch "%"', s.branch_id
					USING DETAIL = format('Numbers of lane %s used for two events, in this batch: %s. Both events of each are kept.', s.lane, forks),
						HINT = 'The branch''s server was cloned, or set back without noticing. See softmobile.central_forks.';
			END IF;
		END IF;
		PERFORM softmobile.central_add_numbers(s.branch_id, s.epoch, s.lane, false,
			CASE WHEN s.high - s.low + 1 = numbers THEN int8multirange(int8range(s.low, s.high, '[]'))
				ELSE (SELECT range_agg(int8range(e.seq, e.seq, '[]')) FROM unnest(events) AS e
					WHERE (e.branch_id, e.epoch, e.lane) = (s.branch_id, s.epoch, s.lane)) END);
		INSERT INTO softmobile.central_lane AS l (branch_id, epoch, lane, epoch_no, highest_seq, events, last_received_at)
		VALUES (s.branch_id, s.epoch, s.lane, s.epoch_no, s.high, s.events, now())
		ON CONFLICT (branch_id, epoch, lane) DO UPDATE
		SET highest_seq = greatest(l.highest_seq, excluded.highest_seq), events = l.events + excluded.events, last_received_at = excluded.last_received_at;
	END LOOP;
END
$$;
COMMENT ON FUNCTION softmobile.central_take_numbers(softmobile.central_event[]) IS
'Internal: writes down the numbers of new events; one that was there before is a fork. The caller has locked the branches.';

/* The inbox. */

CREATE FUNCTION softmobile.central_write(events softmobile.central_event[]) RETURNS boolean
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'softmobile_central_write';
COMMENT ON FUNCTION softmobile.central_write(softmobile.central_event[]) IS
'Internal: writes events into the inbox without a statement, or nothing and returns false: the table has become something that needs one (partitions, other columns, rules, policies, triggers of statements). Error: 23505 one of them is there.';

CREATE FUNCTION softmobile.central_keep(events softmobile.central_event[]) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF NOT softmobile.central_write(events) THEN
		INSERT INTO softmobile.central_inbox (branch_id, id, epoch, seq, event_time, received_at, epoch_no, lane,
			entity_type, entity_id, op, effect, actor, reason, data)
		SELECT e.branch_id, e.id, e.epoch, e.seq, e.event_time, now(), e.epoch_no, e.lane,
			e.entity_type, e.entity_id, e.op, 'applied', e.actor, e.reason, e.data
		FROM unnest(events) AS e;
	END IF;
END
$$;
COMMENT ON FUNCTION softmobile.central_keep(softmobile.central_event[]) IS 'Internal: puts events into the inbox. Error: 23505 one of them is there.';

/* The projection. */

CREATE FUNCTION softmobile.central_same(a jsonb, b jsonb) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	moment CONSTANT text := '^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d(:\d\d)?)$';
BEGIN
	IF a = b THEN
		RETURN true;
	ELSIF a #>> '{}' ~ moment AND b #>> '{}' ~ moment THEN
		RETURN (a #>> '{}')::timestamptz = (b #>> '{}')::timestamptz;
	END IF;
	RETURN false;
EXCEPTION WHEN data_exception THEN
	RETURN false;
END
$$;
COMMENT ON FUNCTION softmobile.central_same(jsonb, jsonb) IS
'Internal: whether two values are the same; a moment is, in whatever time zone the session that wrote it was.';

CREATE FUNCTION softmobile.central_differences(op text, held jsonb, old jsonb, new jsonb) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN ARRAY(
	SELECT v.key FROM jsonb_each(CASE op WHEN 'insert' THEN new ELSE old END) AS v (key, value)
	-- A column that central does not hold was added at the branch: nothing to differ from.
	WHERE held ? v.key AND NOT softmobile.central_same(held -> v.key, v.value)
		AND NOT (op = 'update' AND new ? v.key AND softmobile.central_same(held -> v.key, new -> v.key))
	ORDER BY v.key);
COMMENT ON FUNCTION softmobile.central_differences(text, jsonb, jsonb, jsonb) IS
'Internal: the columns in which central''s row differs from what the event found at the branch; not those that central already holds as the event leaves them.';

CREATE FUNCTION softmobile.central_apply(e softmobile.central_event, blocked boolean, OUT effect text, OUT detail text, OUT held jsonb)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	p softmobile.central_projection;
	known boolean;
	newer boolean;
	columns text[];
	changed jsonb;
	decided softmobile.central_conflict;
	forced boolean := false;
BEGIN
	SELECT * INTO p FROM softmobile.central_projection t
	WHERE t.branch_id = e.branch_id AND t.entity_type = e.entity_type AND t.entity_id = e.entity_id;
	known := FOUND;
	held := p.row;
	newer := NOT known OR (e.order_epoch, e.seq) > (p.epoch_no, p.seq);
	effect := 'applied';
	IF e.resolution = 'local' THEN
		-- A decision is about the row that central held when it told of the conflict. What headquarters has changed since is
		-- decided anew. An event in no conflict itself is the one by which the branch took over central's row, after an overruled one.
		SELECT k.* INTO decided FROM softmobile.central_conflict k JOIN softmobile.central_inbox i USING (branch_id, id)
		WHERE k.branch_id = e.branch_id AND i.entity_type = e.entity_type AND i.entity_id = e.entity_id AND (k.id = e.id OR i.effect = 'overruled')
		ORDER BY k.id = e.id DESC, i.epoch_no DESC, i.seq DESC LIMIT 1;
		forced := CASE WHEN FOUND THEN decided.central_row IS NOT DISTINCT FROM held ELSE p.changed_here IS NOT TRUE END;
	END IF;

	IF e.resolution = 'central' THEN
		effect := 'overruled';
	ELSIF forced THEN
		-- The branch's version wins, unless the branch itself has sent a newer one since.
		IF NOT newer AND NOT (e.op = 'update' AND p.changed_here AND held IS NOT NULL) THEN
			effect := 'older';
		END IF;
	ELSIF blocked THEN
		effect := 'conflict';
		detail := 'an earlier event of the same entity is in conflict';
	ELSIF NOT newer OR (e.order_epoch = 0 AND p.changed_here) THEN
		effect := 'older';
	ELSIF known THEN
		columns := softmobile.central_differences(e.op, held, e.old, e.new);
		detail := CASE
			WHEN held IS NULL AND e.op = 'update' THEN 'headquarters holds the row as deleted'
			WHEN held IS NULL AND e.op = 'insert' AND p.changed_here THEN 'headquarters has deleted the row'
			WHEN cardinality(columns) > 0 AND e.op = 'insert' THEN 'headquarters holds another row of this identity, with other values of ' || array_to_string(columns, ', ')
			WHEN cardinality(columns) > 0 THEN 'headquarters holds other values of ' || array_to_string(columns, ', ')
			END;
		-- Numbers that have not arrived may explain a difference that headquarters did not make; so may a snapshot.
		IF detail IS NOT NULL AND (p.changed_here OR (p.epoch_no > 0 AND e.order_epoch > 0
			AND (p.epoch_no < e.order_epoch OR softmobile.central_complete(e.branch_id, e.epoch, e.lane, p.seq, e.seq)))) THEN
			effect := 'conflict';
		ELSE
			detail := NULL;
		END IF;
	END IF;

	IF effect = 'applied' THEN
		changed := CASE
			WHEN e.op = 'delete' THEN NULL
			-- Columns that only headquarters has changed stay as they are there, unless somebody has decided on the whole row.
			WHEN e.op = 'update' AND p.changed_here AND held IS NOT NULL AND NOT (forced AND newer) THEN held || coalesce((
				SELECT jsonb_object_agg(o.key, e.new -> o.key) FROM jsonb_object_keys(e.old) AS o (key) WHERE e.new ? o.key), '{}')
			ELSE e.new END;
		INSERT INTO softmobile.central_projection AS t (branch_id, entity_type, entity_id, seq, changed_at, epoch_no, deleted, changed_here, row)
		VALUES (e.branch_id, e.entity_type, e.entity_id, e.seq, now(), e.order_epoch, changed IS NULL, coalesce(changed <> e.new, false), changed)
		ON CONFLICT (branch_id, entity_type, entity_id) DO UPDATE
		SET seq = CASE WHEN newer THEN excluded.seq ELSE t.seq END, epoch_no = CASE WHEN newer THEN excluded.epoch_no ELSE t.epoch_no END,
			changed_at = excluded.changed_at, deleted = excluded.deleted, changed_here = excluded.changed_here, row = excluded.row;
	END IF;

	IF effect = 'conflict' THEN
		INSERT INTO softmobile.central_conflict (branch_id, id, central_row, detail, detected_at)
		VALUES (e.branch_id, e.id, held, detail, now())
		ON CONFLICT (branch_id, id) DO UPDATE SET central_row = excluded.central_row, detail = excluded.detail, resolved_at = NULL;
	ELSIF e.resolution IS NOT NULL OR known THEN
		UPDATE softmobile.central_conflict k SET resolved_at = now() WHERE k.branch_id = e.branch_id AND k.id = e.id AND k.resolved_at IS NULL;
	END IF;
	UPDATE softmobile.central_inbox i SET effect = central_apply.effect
	WHERE i.branch_id = e.branch_id AND i.id = e.id AND i.effect <> central_apply.effect;
END
$$;
COMMENT ON FUNCTION softmobile.central_apply(softmobile.central_event, boolean) IS
'Internal: what one event in the inbox does to the projection, and what central held. blocked: an earlier event of the entity is in conflict. The caller has locked the branch.';

CREATE FUNCTION softmobile.central_project(events softmobile.central_event[]) RETURNS integer[]
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'softmobile_central_project';
COMMENT ON FUNCTION softmobile.central_project(softmobile.central_event[]) IS
'Internal: applies the events of entities with which all is as usual, and returns the places of the others, for central_apply(). The caller has locked the branches.';

/* The batch. */

CREATE FUNCTION softmobile.central_allowed(token_hash bytea) RETURNS text[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	allowed text[];
BEGIN
	SELECT t.branches INTO allowed FROM softmobile.central_token t
	WHERE t.token_hash = central_allowed.token_hash AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now());
	IF NOT FOUND THEN
		RAISE EXCEPTION 'the token is not valid'
			USING ERRCODE = 'SM401', HINT = 'Ask headquarters for a token: central_create_token().';
	END IF;
	RETURN allowed;
END
$$;
COMMENT ON FUNCTION softmobile.central_allowed(bytea) IS 'Internal: the branches that a token (its SHA-256) may write for. Error: SM401.';

-- Plans are kept as long as the gateway's connection: one made while the tables were small must do when they are not.
CREATE FUNCTION softmobile.central_receive(body text, token_hash bytea) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET work_mem = '32MB'
AS $$
#variable_conflict use_column
DECLARE
	allowed text[] := softmobile.central_allowed(token_hash);
	doc json;
	batch softmobile.central_event[];
	fresh softmobile.central_event[];
	again softmobile.central_event[] := '{}';
	e softmobile.central_event;
	part json;
	readable json;
	place integer;
	total integer;
	branches text[];
	locked text[];
	refused text;
	unusual integer[];
	known record;
	outcome record;
	entity text;
	blocked boolean;
	answers json[] := '{}';
	places integer[] := '{}';
	duplicates integer := 0;
BEGIN
	BEGIN
		batch := softmobile.central_parse(body);
	EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
		batch := NULL;
	END;
	total := cardinality(batch);
	IF batch IS NULL THEN
		BEGIN
			doc := body::json;
		EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
			RAISE EXCEPTION 'the body cannot be read as JSON: %', SQLERRM USING ERRCODE = 'SM400';
		END;
		IF json_typeof(doc) IS DISTINCT FROM 'array' THEN
			RAISE EXCEPTION 'the body is not a JSON array of events' USING ERRCODE = 'SM400';
		END IF;
		total := json_array_length(doc);
		IF total > 20000 THEN
			RAISE EXCEPTION 'a batch has at most 20000 events' USING ERRCODE = 'SM413';
		END IF;
		batch := '{}';
		FOR part, place IN SELECT x.value, x.n FROM json_array_elements(doc) WITH ORDINALITY AS x (value, n) LOOP
			-- What JSON can say and text cannot hold (zero, half a surrogate pair) spoils its own event only: to read the id, take spaces instead.
			readable := regexp_replace(part::text, '\\u(0000|[dD][89a-fA-F][0-9a-fA-F]{2})', '\\u0020', 'g');
			IF json_typeof(part) <> 'object' OR readable ->> 'id' IS NULL OR readable ->> 'specversion' IS NULL THEN
				RAISE EXCEPTION 'element % of the batch is not a CloudEvent: it needs specversion and id', place USING ERRCODE = 'SM422';
			END IF;
			BEGIN
				batch := batch || softmobile.central_parse_event(part, place);
			EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
				answers := answers || json_build_object('id', readable ->> 'id', 'status', 'rejected', 'detail', left(SQLERRM, 200));
				places := places || place;
			END;
		END LOOP;
	END IF;

	-- From here on nobody else writes what belongs to these branches.
	branches := ARRAY(SELECT DISTINCT b.branch_id FROM softmobile.central_numbers(batch) AS b ORDER BY 1);
	locked := ARRAY(SELECT b.branch_id FROM softmobile.central_branch b
		WHERE b.branch_id = ANY (branches) AND b.branch_id = ANY (allowed) AND b.active
		ORDER BY b.branch_id FOR NO KEY UPDATE);
	SELECT b INTO refused FROM unnest(branches) AS b WHERE b <> ALL (locked) LIMIT 1;
	IF FOUND THEN
		RAISE EXCEPTION 'this token may not write for branch "%"', left(refused, 100)
			USING ERRCODE = 'SM403', HINT = 'Ask headquarters for a token of this branch, or to activate it.';
	END IF;

	BEGIN
		PERFORM softmobile.central_keep(batch);
		fresh := batch;
	EXCEPTION WHEN unique_violation THEN
		-- Some have been here before, or stand in the batch twice.
		fresh := '{}';
		FOR known IN SELECT b.event, i.id IS NOT NULL AS received, i.effect, (i.entity_type, i.entity_id, i.op, i.data::text) IS DISTINCT FROM ((b.event).entity_type, (b.event).entity_id, (b.event).op, (b.event).data::text) AS altered,
				b.nth
			FROM (SELECT b AS event, row_number() OVER (PARTITION BY b.branch_id, b.id ORDER BY b.n) AS nth FROM unnest(batch) AS b) AS b
				LEFT JOIN LATERAL (SELECT * FROM softmobile.central_inbox i WHERE i.branch_id = (b.event).branch_id AND i.id = (b.event).id OFFSET 0) AS i ON true
			ORDER BY (b.event).n
		LOOP
			e := known.event;
			IF known.nth > 1 THEN
				duplicates := duplicates + 1;
			ELSIF NOT known.received THEN
				fresh := fresh || e;
			ELSIF known.altered THEN
				answers := answers || json_build_object('id', e.id, 'status', 'rejected', 'detail', 'an event with this id and other content was received before');
				places := places || e.n;
			ELSIF known.effect = 'conflict' THEN
				again := again || e;
			ELSE
				duplicates := duplicates + 1;
			END IF;
		END LOOP;
		PERFORM softmobile.central_keep(fresh);
	END;
	PERFORM softmobile.central_take_numbers(fresh);
	unusual := softmobile.central_project(fresh);

	IF unusual IS NOT NULL OR cardinality(again) > 0 THEN
		FOR e IN SELECT (x.event).* FROM (
				SELECT f AS event FROM unnest(fresh) AS f WHERE f.n = ANY (unusual)
				UNION ALL
				SELECT a FROM unnest(again) AS a) AS x
			ORDER BY (x.event).branch_id, (x.event).entity_type, (x.event).entity_id, (x.event).order_epoch, (x.event).seq
		LOOP
			blocked := coalesce(blocked AND entity = format('%L %L %L', e.branch_id, e.entity_type, e.entity_id), false);
			entity := format('%L %L %L', e.branch_id, e.entity_type, e.entity_id);
			outcome := softmobile.central_apply(e, blocked);
			IF outcome.effect = 'conflict' THEN
				blocked := true;
				answers := answers || json_build_object('id', e.id, 'status', 'conflict', 'detail', outcome.detail, 'current', outcome.held);
				places := places || e.n;
			END IF;
		END LOOP;
	END IF;

	UPDATE softmobile.central_branch b SET last_seen = now() WHERE b.branch_id = ANY (branches);
	RETURN json_build_object('accepted', total - duplicates - cardinality(answers), 'duplicates', duplicates,
		'results', (SELECT coalesce(json_agg(a.answer ORDER BY a.place), '[]') FROM unnest(answers, places) AS a (answer, place)));
END
$$;
COMMENT ON FUNCTION softmobile.central_receive(text, bytea) IS
'Stores a batch of CloudEvents for the holder of the token (its SHA-256) and returns the receipt. An Idempotency-Key is not needed: an id that was received is a duplicate, one in conflict is looked at again. Errors, as HTTP status: SM400 no JSON array, SM401 token not valid, SM403 not for this branch, SM413 more than 20,000 events, SM422 an element without specversion or id.';

CREATE FUNCTION softmobile.central_admit(token_hash bytea) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	PERFORM softmobile.central_allowed(token_hash);
	RETURN 'admitted';
END
$$;
COMMENT ON FUNCTION softmobile.central_admit(bytea) IS 'Whether a token (its SHA-256) is valid, for the gateway to ask before it takes a body. Error: SM401.';

CREATE FUNCTION softmobile.central_health() RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF pg_is_in_recovery() THEN
		RAISE EXCEPTION 'this server is a standby and takes no events' USING ERRCODE = 'SM503';
	END IF;
	RETURN '{"status":"ok"}';
END
$$;
COMMENT ON FUNCTION softmobile.central_health() IS 'The answer to GET /health when this server can take events. Error: SM503.';

/* For headquarters. */

CREATE FUNCTION softmobile.central_change(branch text, entity_type text, entity_id text, new_row jsonb, reason text) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
	why text := softmobile.required_reason(reason);
	before jsonb;
BEGIN
	IF jsonb_typeof(new_row) <> 'object' THEN
		RAISE EXCEPTION 'the new row must be a JSON object'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the whole row, or NULL to delete it.';
	END IF;
	PERFORM FROM softmobile.central_branch b WHERE b.branch_id = branch FOR NO KEY UPDATE;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'branch "%" does not exist', branch
			USING ERRCODE = 'undefined_object', HINT = 'SELECT branch_id FROM softmobile.central_branch lists them.';
	END IF;
	SELECT p.row INTO before FROM softmobile.central_projection p
	WHERE p.branch_id = branch AND p.entity_type = entity_type AND p.entity_id = entity_id;
	INSERT INTO softmobile.central_projection AS p (branch_id, entity_type, entity_id, seq, changed_at, epoch_no, deleted, changed_here, row)
	VALUES (branch, entity_type, entity_id, -1, now(), -1, new_row IS NULL, true, new_row)
	ON CONFLICT ON CONSTRAINT central_projection_pkey DO UPDATE
	SET deleted = excluded.deleted, changed_here = true, row = excluded.row, changed_at = excluded.changed_at;
	INSERT INTO softmobile.central_audit (action, branch_id, reason, details, current_user_name)
	VALUES ('change', branch, why, jsonb_build_object('entity_type', entity_type, 'entity_id', entity_id, 'old', before, 'new', new_row), softmobile.calling_role());
END
$$;
COMMENT ON FUNCTION softmobile.central_change(text, text, text, jsonb, text) IS
'Headquarters changes (new_row NULL: deletes) the row of an entity of a branch. If the branch changes the same columns without knowing, that is a conflict. Errors: 22023 no object, 23514 no reason, 42704 no such branch.';

CREATE VIEW softmobile.central_conflicts AS
SELECT k.branch_id, k.id, i.entity_type, i.entity_id, i.op, i.data::jsonb -> 'old' AS branch_old, i.data::jsonb -> 'new' AS branch_new, k.central_row,
	k.detail, i.reason, i.actor, i.event_time, k.detected_at
FROM softmobile.central_conflict k JOIN softmobile.central_inbox i USING (branch_id, id)
WHERE k.resolved_at IS NULL;
COMMENT ON VIEW softmobile.central_conflicts IS 'Open conflicts: what the branch changed beside what central held. They are resolved at the branch, by resolve_conflict().';

CREATE VIEW softmobile.central_forks AS
SELECT f.branch_id, f.epoch, f.lane, f.seq, i.id AS first_id, f.id AS second_id, f.seen_at
FROM softmobile.central_fork f
	LEFT JOIN softmobile.central_inbox i ON i.branch_id = f.branch_id AND i.epoch = f.epoch AND i.lane = f.lane AND i.seq = f.seq AND i.id <> f.id;
COMMENT ON VIEW softmobile.central_forks IS 'Numbers that a branch used for two events, with both events. Reads the inbox from end to end: for people, not for machines.';

CREATE VIEW softmobile.central_lanes AS
SELECT l.branch_id, l.epoch_no, l.epoch, l.lane, l.events, l.highest_seq, l.last_received_at,
	coalesce(n.received, '{}') AS received, coalesce(n.void, '{}') AS void,
	int8multirange(int8range(1, l.highest_seq + 1)) - coalesce(n.received, '{}') - coalesce(n.void, '{}') AS missing
FROM softmobile.central_lane l
	LEFT JOIN LATERAL (
		SELECT range_agg(int8range(s.first_seq, s.last_seq, '[]')) FILTER (WHERE NOT s.void) AS received,
			range_agg(int8range(s.first_seq, s.last_seq, '[]')) FILTER (WHERE s.void) AS void
		FROM softmobile.central_span s WHERE s.branch_id = l.branch_id AND s.epoch = l.epoch AND s.lane = l.lane) AS n ON true;
COMMENT ON VIEW softmobile.central_lanes IS 'Per lane the numbers received, those void, and those missing below the highest: rolled back at the branch and not declared yet, rejected, of another branch (a lane of branches not registered yet), or lost.';

CREATE VIEW softmobile.central_status AS
SELECT b.branch_id, b.active, b.last_seen, coalesce(l.events, 0) AS events, l.last_received_at,
	(SELECT count(*) FROM softmobile.central_conflict c WHERE c.branch_id = b.branch_id AND c.resolved_at IS NULL) AS open_conflicts,
	(SELECT count(*) FROM softmobile.central_fork f WHERE f.branch_id = b.branch_id) AS forks
FROM softmobile.central_branch b
	LEFT JOIN LATERAL (
		SELECT sum(l.events)::bigint AS events, max(l.last_received_at) AS last_received_at
		FROM softmobile.central_lane l WHERE l.branch_id = b.branch_id) AS l ON true;
COMMENT ON VIEW softmobile.central_status IS 'Branches as headquarters sees them: when they were last heard of, how many events came, what needs attention.';

CREATE FUNCTION softmobile.grant_central(role name) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF role IS NULL OR NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = role) THEN
		RAISE EXCEPTION 'role "%" does not exist', role
			USING ERRCODE = 'undefined_object', HINT = coalesce('Create it first: CREATE ROLE ' || quote_ident(role) || ' LOGIN.', 'Name the role that the gateway connects as.');
	END IF;
	EXECUTE format('GRANT EXECUTE ON FUNCTION softmobile.central_admit(bytea), softmobile.central_receive(text, bytea),
		softmobile.central_verify(text, bytea), softmobile.central_reconcile(text, bytea), softmobile.central_reference(bytea, text, text), softmobile.central_health() TO %I', role);
END
$$;
COMMENT ON FUNCTION softmobile.grant_central(name) IS 'Grants a role what the gateway needs, and nothing else. Error: 42704.';
