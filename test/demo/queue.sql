-- One line for the cashier: what was sold, what waits, how old the oldest of it is, how the link is.
SELECT format('   %s  sold %s (%s); waiting: %s', to_char(clock_timestamp(), 'HH24:MI:SS'), v.sales, to_char(v.total, 'FM999,999,990.00'),
	CASE WHEN w.events = 0 THEN 'nothing'
		ELSE format('%s events, %s in sales, the oldest for %s s%s', w.events, to_char(w.amount, 'FM999,999,990.00'), w.age,
			CASE WHEN w.problem IS NULL THEN '' ELSE ' (' || w.problem || ')' END) END)
FROM (SELECT count(*) AS sales, coalesce(sum(total), 0) AS total FROM ventas) AS v,
	(SELECT count(*) AS events, coalesce(sum(e.amount) FILTER (WHERE o.entity_type = 'sale' AND o.operation = 'insert'), 0) AS amount,
		round(extract(epoch FROM clock_timestamp() - min(o.created_at))) AS age, max(o.error_message) AS problem
	FROM softmobile.sync_outbox AS o JOIN softmobile.outbox_event AS e USING (id)
	WHERE o.status IN ('PENDING', 'FAILED')) AS w;
